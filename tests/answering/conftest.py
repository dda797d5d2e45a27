import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small models gain nothing by more threads, and lose much where other work keeps the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)
