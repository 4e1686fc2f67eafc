"""The lean loop yields the tokens of `model.generate`, in the straight form and through the model's own."""

import pytest
import tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

import luthier
from luthier.acceleration.decoding import generate
from luthier.acceleration.straight import Straight, straight, without_onednn
from luthier.compression.grid import Scheme, fit
from luthier.compression.linear import matrix, quantize_layer
from luthier.errors import MethodError
from luthier.models import structure

SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
PROMPT = torch.tensor([[11, 42, 99, 7, 300, 51, 12], [20, 21, 22, 23, 24, 25, 26]])


def small(config, kind, **changes):
    torch.manual_seed(0)
    options = {"num_hidden_layers": 2, "vocab_size": tiny.VOCAB, "pad_token_id": 0, "eos_token_id": 3}
    return kind(config(**SHAPE | options | {"initializer_range": 0.1} | changes)).eval()


def mistral(**changes):
    return small(MistralConfig, MistralForCausalLM, **{"sliding_window": None} | changes)


def quantised(scheme):
    model = tiny.llama(**SHAPE)
    for name, layer in structure.linears(model).items():
        grid = fit(matrix(layer), scheme)
        model.set_submodule(name, quantize_layer(layer, grid.quantize(matrix(layer)), grid))
    return luthier.accelerate(model)


def with_lora():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model(tiny.llama(), config).eval()


STRAIGHT = {
    "llama": tiny.llama,
    "as many keys as queries": lambda: tiny.llama(num_key_value_heads=4),
    "bias": lambda: tiny.llama(attention_bias=True, mlp_bias=True),
    "longer positions": lambda: tiny.llama(
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    ),
    "mistral": mistral,
    "lora": with_lora,
    "int4": lambda: quantised(Scheme(4, 32)),
    "int8": lambda: quantised(Scheme(8, None)),
}
OWN = {
    "gpt2": tiny.gpt2,
    "window": lambda: mistral(sliding_window=4),
    "norms on queries and keys": lambda: small(Qwen3Config, Qwen3ForCausalLM, head_dim=64),
}


def theirs(model, ids, count, **options):
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False} | options
    with torch.no_grad():
        return model.generate(input_ids=ids, max_new_tokens=count, **options)


def shortfall(model, tokens, start):
    """By how much the logit of a token that was taken was less than the best one's, relative, at the most."""
    with torch.no_grad():
        logits = model(tokens).logits[:, start - 1 : -1].float()
    best, taken = logits.max(-1).values, logits.gather(2, tokens[:, start:, None])[..., 0]
    return float(((best - taken) / best.abs()).max())


@pytest.mark.parametrize("name", STRAIGHT)
def test_straight_form_gives_the_same_tokens(name):
    model = STRAIGHT[name]()
    assert isinstance(straight(model), Straight), straight(model)
    for ids in (PROMPT[:1], PROMPT[:1, :1], PROMPT):
        assert torch.equal(generate(model, ids, max_new_tokens=24), theirs(model, ids, 24))


def test_inputs_in_whole_numbers_give_the_same_tokens_up_to_rounding():
    """A sum in another order moves an input over a step of its grid now and then."""
    model = quantised(Scheme(8, None, activation_bits=8))
    assert isinstance(straight(model), Straight), straight(model)
    found = generate(model, PROMPT, max_new_tokens=24, eos_token_id=[])
    assert shortfall(model, found, PROMPT.shape[1]) <= 0.02
    assert shortfall(model, (found + 1) % tiny.VOCAB, PROMPT.shape[1]) > 0.1


@pytest.mark.parametrize("name", OWN)
def test_other_models_give_the_same_tokens_through_their_own_pass(name):
    model = OWN[name]()
    assert isinstance(straight(model), str)
    for ids in (PROMPT[:1], PROMPT):
        assert torch.equal(generate(model, ids, max_new_tokens=24), theirs(model, ids, 24))


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_padded_rows(build):
    model = build()
    mask = torch.ones_like(PROMPT)
    mask[0, :3] = 0
    ids = PROMPT * mask
    expected = theirs(model, ids, 12, attention_mask=mask)
    assert torch.equal(generate(model, ids, max_new_tokens=12, attention_mask=mask), expected)
    with pytest.raises(MethodError, match="padded on its right"):
        generate(model, ids, max_new_tokens=2, attention_mask=mask.flip(1))


def test_logits_are_the_models_own_at_every_step():
    model = tiny.llama()
    step = straight(model)
    ids = theirs(model, PROMPT, 20, eos_token_id=None)
    with torch.no_grad():
        expected = model(ids).logits
        step.reserve(2, ids.shape[1])
        for end in range(PROMPT.shape[1], ids.shape[1]):
            found = step(ids[:, :end] if end == PROMPT.shape[1] else ids[:, end - 1 : end])
            torch.testing.assert_close(found, expected[:, end - 1], rtol=1e-4, atol=1e-5)


def test_rows_end_by_themselves():
    model = tiny.llama()
    first = theirs(model, PROMPT, 12, eos_token_id=[])
    end = int(first[0, PROMPT.shape[1] + 2])
    expected = theirs(model, PROMPT, 12, eos_token_id=end)
    assert torch.equal(generate(model, PROMPT, max_new_tokens=12, eos_token_id=end), expected)
    alone = generate(model, PROMPT[:1], max_new_tokens=12, eos_token_id=[end])
    assert alone[0, -1] == end
    assert alone.shape[1] <= PROMPT.shape[1] + 3


def test_drawn_tokens_are_those_of_generate():
    model = tiny.llama()
    torch.manual_seed(5)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    expected = theirs(model, PROMPT, 16, **options)
    torch.manual_seed(5)
    found = generate(model, PROMPT, max_new_tokens=16, temperature=0.7, top_k=20, top_p=0.9)
    assert torch.equal(found, expected)


def test_tokens_are_handed_over_as_they_come():
    seen: list[torch.Tensor] = []
    found = generate(tiny.llama(), PROMPT, max_new_tokens=5, on_token=seen.append)
    assert torch.equal(torch.stack(seen, 1), found[:, PROMPT.shape[1] :])


def test_nothing_is_asked_of_a_limit_of_zero():
    assert torch.equal(generate(tiny.llama(), PROMPT, max_new_tokens=0), PROMPT)


def test_what_changed_since_the_proof_is_proven_anew():
    model = tiny.llama()
    assert isinstance(straight(model), Straight)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)
    assert "hook" in straight(model)
    assert torch.equal(generate(model, PROMPT, max_new_tokens=8), theirs(model, PROMPT, 8))
    handle.remove()
    assert isinstance(straight(model), Straight)


def test_a_model_that_only_looks_like_llama_is_found_out():
    model = tiny.llama()
    model.model.layers[1].self_attn.__class__ = type("Other", (type(model.model.layers[1].self_attn),), {})
    original = type(model.model.layers[1].self_attn).forward

    def scaled(self, *args, **kwargs):
        output, weights = original(self, *args, **kwargs)
        return 1.5 * output, weights

    type(model.model.layers[1].self_attn).forward = scaled
    assert "logits differ" in straight(model)
    assert torch.equal(generate(model, PROMPT, max_new_tokens=8), theirs(model, PROMPT, 8))


def test_settings_that_are_not_done_here_are_refused():
    model = tiny.llama()
    model.generation_config.repetition_penalty = 1.2
    with pytest.raises(MethodError, match="repetition_penalty"):
        generate(model, PROMPT, max_new_tokens=2)
    with pytest.raises(MethodError, match="drawn"):
        generate(tiny.llama(), PROMPT, max_new_tokens=2, top_k=5)


def test_other_models_are_refused():
    with pytest.raises(MethodError, match="causal"):
        generate(tiny.t5(), PROMPT, max_new_tokens=2)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(MethodError, match="soft prompts"):
        generate(get_peft_model(tiny.llama(), config), PROMPT, max_new_tokens=2)


def test_the_switch_of_onednn_goes_back():
    before = torch.backends.mkldnn.enabled
    with without_onednn():
        assert not torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled == before
    with pytest.raises(ZeroDivisionError), without_onednn():
        1 / 0  # noqa: B018
    assert torch.backends.mkldnn.enabled == before


@pytest.mark.model
def test_the_real_model_in_float32(smollm2):
    model, tokenizer = luthier.load(smollm2, dtype="float32")
    ids = tokenizer("The history of the violin begins in", return_tensors="pt").input_ids
    assert isinstance(straight(model), Straight)
    assert torch.equal(generate(model, ids, max_new_tokens=24), theirs(model, ids, 24))


@pytest.mark.model
def test_the_real_model_in_bfloat16(smollm2):
    """Where tokens part, the model's own logits of the two lie within bfloat16's rounding of each other."""
    model, tokenizer = luthier.load(smollm2, dtype="bfloat16")
    ids = tokenizer("The history of the violin begins in", return_tensors="pt").input_ids
    found = generate(model, ids, max_new_tokens=32, eos_token_id=[])
    assert shortfall(model, found, ids.shape[1]) <= 2**-6
