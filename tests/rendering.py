"""Chat templates of three families, each with a hand-written rendering as segments (text, trained).

The segments are the oracle of the mask tests: they are written down from the families' documented formats,
tokenised one by one, and share nothing with the code under test.
"""

import random

import tiny

CHATML = tiny.CHATML
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Rewrites earlier turns (drops their thoughts), as Qwen 3 does.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Opens a thought in the served prompt that its history leaves out, as DeepSeek R1 does.
OPENER = (
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% set c = c.split('</think>')[-1] | trim %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# Serves another header than it renders.
INCONSISTENT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)


def tokenizer(template, **options):
    made = tiny.tokenizer(template=template, **options)
    made.add_special_tokens(
        {"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]},
        replace_extra_special_tokens=False,
    )
    return made


def chatml(messages):
    for m in messages:
        learnt = m["role"] == "assistant"
        yield f"<|im_start|>{m['role']}\n", False
        yield m["content"], learnt
        yield "<|im_end|>", learnt
        yield "\n", False


def llama3(messages):
    yield "<s>", False
    for m in messages:
        learnt = m["role"] == "assistant"
        yield f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False
        yield m["content"].strip(), learnt
        yield "<|eot_id|>", learnt


def mistral(messages):
    yield "<s>", False
    for m in messages:
        if m["role"] == "user":
            yield f"[INST] {m['content']} [/INST]", False
        else:
            yield f" {m['content']}", True
            yield "<|im_end|>", True  # the tiny tokenizer's eos


def zephyr(messages):
    for m in messages:
        learnt = m["role"] == "assistant"
        yield f"<|{m['role']}|>\n", False
        yield m["content"], learnt
        yield "<|im_end|>", learnt
        yield "\n", False


FAMILIES = {
    "chatml": (CHATML, chatml, True),
    "llama3": (LLAMA3, llama3, True),
    "mistral": (MISTRAL, mistral, False),
    "zephyr": (ZEPHYR, zephyr, True),
}


def oracle(tokenizer, segments):
    """(ids, labels) of segments that are tokenised one by one."""
    ids, labels = [], []
    for text, learnt in segments:
        part = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        ids += part
        labels += part if learnt else [-100] * len(part)
    return ids, labels


WORDS = [
    "The",
    "order",
    "printer",
    "42",
    "ä→",
    "naïve",
    "{",
    "}",
    "a luthier",
    "\n\n",
    "…",
    "🎻",
    "  ",
    "Answer:",
]


def conversations(count, seed=0, system=True):
    """Random dialogues of one to four rounds, some with a system message."""
    draw = random.Random(seed)

    def say():
        return "x" + " ".join(draw.choices(WORDS, k=draw.randint(1, 9))) + "x"

    made = []
    for _ in range(count):
        messages = [{"role": "system", "content": say()}] if system and draw.random() < 0.4 else []
        for _ in range(draw.randint(1, 4)):
            messages += [{"role": "user", "content": say()}, {"role": "assistant", "content": say()}]
        made.append(messages)
    return made
