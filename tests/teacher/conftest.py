from tests.generation.runs import environment, undisturbed  # noqa: F401  (fixtures)
