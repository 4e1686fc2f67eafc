"""Frozen bottom: the complement of top layers, counted from below."""

import pytest
import tiny

from luthier import method
from luthier.errors import MethodError
from luthier.tuning.attach import attach
from luthier.tuning.groups import trained_names


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bert, tiny.t5])
def test_opens_what_top_layers_opens(make):
    depth = 4 if make is tiny.t5 else 2
    for n in range(depth + 1):
        bottom = attach(make(), method("frozen_bottom")(n=n))
        top = attach(make(), method("top_layers")(k=depth - n))
        assert trained_names(bottom) == trained_names(top)


def test_nothing_frozen_but_embeddings_is_full_fine_tuning_with_them():
    model = attach(tiny.llama(), method("frozen_bottom")(n=0, train_embeddings=True))
    assert all(p.requires_grad for p in model.parameters())


def test_an_encoder_decoder_freezes_the_encoder_first():
    model = attach(tiny.t5(), method("frozen_bottom")(n=2))
    assert not any(p.requires_grad for p in model.encoder.block.parameters())
    assert all(p.requires_grad for p in model.decoder.block.parameters())


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(MethodError, match=r"n: 5 blocks.*between 0 and 2"):
        attach(tiny.llama(), method("frozen_bottom")(n=5))
