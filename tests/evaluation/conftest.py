from tests.generation.runs import environment  # noqa: F401  the key that no file may hold
