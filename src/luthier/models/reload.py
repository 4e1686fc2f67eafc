"""Run as a script in a fresh process: load a saved folder with transformers and PEFT alone; compute a probe.

    python -I reload.py REQUEST.json INPUTS.safetensors ANSWER.safetensors

`luthier.models.saving.verify_export` starts it and compares. Nothing of luthier can be imported here: the
folder must stand on its own. The exceptions are an adapter of a type that only `import luthier.tuning` makes
PEFT know, a model whose blocks differ in width (`import luthier.models.per_layer`), and one with clustered
layers (`import luthier.compression.clustered_storage`), as a user of them must write too.
"""

import json
import os
import sys
from typing import Any

sys.modules["luthier"] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def load_model(request: dict[str, Any]) -> Any:
    """The whole model in the folder, or its base with the adapter in the folder on it."""
    options = dict(request["options"])
    if request["per_layer"]:
        del sys.modules["luthier"]
        import luthier.models.per_layer
    if request["clustered"]:
        if sys.modules["luthier"] is None:
            del sys.modules["luthier"]
        import luthier.compression.clustered_storage
    if request["quantization"] is not None:
        options["quantization_config"] = transformers.BitsAndBytesConfig(**request["quantization"])
        options["device_map"] = {"": request["device"]}
    if "gguf_file" in options:
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    base = getattr(transformers, request["class"]).from_pretrained(request["base"], **options)
    for layer in base.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # it would compute in bfloat16 whatever the dtype
            layer.support_avx512bf16_for_cpu = False
    if request["adapter"] is None:
        return base.to(request["device"]).eval()
    from peft import PeftModel

    if request["rows"] != len(base.get_input_embeddings().weight):  # tokens were added
        base.resize_token_embeddings(request["rows"], mean_resizing=False)
    base.config.pad_token_id = request["pad_token_id"]  # a classifier reads the last token that is none
    if request["ours"]:
        if sys.modules["luthier"] is None:
            del sys.modules["luthier"]
        import luthier.tuning  # noqa: F401
    model = PeftModel.from_pretrained(base.to(request["device"]), request["adapter"])
    return model.eval()


def load_tokenizer(request: dict[str, Any]) -> list[list[int]]:
    """Token ids of the request's texts, and of its chat through the template that the folder has."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["folder"])
    ids = [tokenizer(text).input_ids for text in request["texts"]]
    if request["chat"]:
        text = tokenizer.apply_chat_template(request["chat"], tokenize=False, add_generation_prompt=True)
        ids.append(tokenizer(text, add_special_tokens=False).input_ids)
    return ids


def main(request_file: str, inputs_file: str, answer_file: str) -> None:
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    torch.set_num_threads(request["threads"])
    model = load_model(request)
    inputs = load_file(inputs_file, device=request["device"])
    answer = {}
    with torch.no_grad():
        answer["logits"] = model(**inputs).logits.float().cpu().contiguous()
        if request["new_tokens"]:
            inputs.pop("decoder_input_ids", None)
            length = request["new_tokens"]
            made = model.generate(**inputs, do_sample=False, min_new_tokens=length, max_new_tokens=length)
            answer["generated"] = made.cpu().contiguous()
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    tokens = load_tokenizer(request) if request["texts"] else []
    save_file(answer, answer_file, metadata={"tokens": json.dumps(tokens), "ends": json.dumps(ends)})


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*sys.argv[1:])
