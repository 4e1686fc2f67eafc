"""A tour of what users get wrong: each mistake is one paragraph, without traceback, with status 2, and says
which file, line or key is meant and what is valid instead.

The command line runs in this process, as its `main`; models are tiny and made in code.
"""

import errno
import json
import logging
import os
import shutil
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from safetensors import SafetensorError

from luthier.alignment import callbacks
from luthier.cli import main
from luthier.errors import ResourceError, TrainingError
from luthier.models import gguf, sources
from luthier.models.saving import save

GOOD = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(12)]
TUNE = """\
name: demo
model: {name: base, dtype: float32, device: cpu}
stages:
  - tune:
      data: train.jsonl
      method: {name: lora, r: 4}
      objective: {name: sft, max_length: 128}
      training: {max_steps: 6, save_steps: 2, per_device_train_batch_size: 2}
"""
EVALUATE = """\
name: demo
model: {name: base, dtype: float32, device: cpu}
stages:
  - evaluate: {data: train.jsonl, metrics: [exact_match], generation: {max_new_tokens: 4}}
"""


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    def refusal(self) -> str:
        """The one paragraph of the error, with which the output ends."""
        assert self.status == 2, self
        assert "Traceback" not in self.out + self.err
        _, mark, paragraph = f"\n{self.err}".rpartition("\nerror: ")
        assert mark, self.err
        assert len(paragraph.splitlines()) == 1, paragraph
        return paragraph.strip()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, recipes, and data files that are good or bad in one way."""
    folder = tmp_path_factory.mktemp("tour")
    save(tiny.llama(), folder / "base", tiny.tokenizer())
    (folder / "tune.yaml").write_text(TUNE)
    (folder / "evaluate.yaml").write_text(EVALUATE)
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in GOOD)
    last = {
        "train.jsonl": b"",
        "unanswered.jsonl": b'{"prompt": "Hi"}\n',
        "blank.jsonl": b'{"prompt": "Hi", "completion": " "}\n',
        "long.jsonl": json.dumps({"prompt": "word " * 40_000, "completion": "Yo"}).encode() + b"\n",
        "latin.jsonl": b'{"prompt": "caf\xe9", "completion": "x"}\n',
        "torn.jsonl": b'{"prompt": "caf',
    }
    for name, line in last.items():
        (folder / name).write_bytes(lines + line)
    (folder / "empty.jsonl").write_bytes(b"\n")
    (folder / "latin.csv").write_bytes(b"prompt,completion\na,b\ncaf\xe9,x\n")
    (folder / "file").write_text("a file where a folder is needed")
    (folder / "strings.jsonl").write_text('"a"\n"b"\n')
    (folder / "other.csv").write_text("question,reply\na,b\n")
    row = {"prompt": "Hi", "completion": "word " * 40_000}
    (folder / "long_answer.jsonl").write_bytes(lines + json.dumps(row).encode() + b"\n")
    save(tiny.gpt2(), folder / "gpt2", tiny.tokenizer())
    save(tiny.bert(), folder / "bert", tiny.tokenizer())
    shutil.copytree(folder / "base", folder / "no_tokens")
    (folder / "no_tokens" / "tokenizer.json").write_text("{}")
    (folder / "no_tokens" / "luthier.json").unlink()
    return folder


@pytest.fixture
def luthier(place, tmp_path, monkeypatch, capsys):
    """Run a command in the folder of `place`; runs are left in a folder of the test's own."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*words):
        words = [str(word) for word in words]
        if "run" in words and "--output" not in words and not any(w.startswith("output=") for w in words):
            words += ["--output", str(tmp_path / "runs")]
        monkeypatch.setattr(sys, "argv", ["luthier", *words])
        capsys.readouterr()
        status = 0
        try:
            main.main()
        except SystemExit as end:
            status = end.code
        return Result(status or 0, *capsys.readouterr())

    yield run
    root.handlers[:], root.level = handlers, level
    logging.getLogger("luthier").setLevel(logging.NOTSET)


DATA = {
    "missing": ("trian.jsonl", "there is no data file trian.jsonl", "'train.jsonl'"),
    "empty": ("empty.jsonl", "empty.jsonl is empty", "Check the path"),
    "wrong column": (
        "{path: train.jsonl, columns: {prompt: promt, completion: completion}}",
        "train.jsonl has no column 'promt' (mapped to prompt)",
        "Did you mean 'prompt'?",
    ),
    "without answer": ("unanswered.jsonl", "unanswered.jsonl:13: 'completion' is missing", "on_bad: quara"),
    "blank answer": ("blank.jsonl", "blank.jsonl:13: 'completion' is empty", "Correct the record"),
    "broken UTF-8": ("latin.jsonl", "latin.jsonl:13: byte 15 of the line (0xe9) is not UTF-8", "quarantine"),
    "broken UTF-8 in CSV": ("latin.csv", "latin.csv:3: byte 25 (0xe9) is not UTF-8", "iconv -f LATIN1"),
    "torn": ("torn.jsonl", "torn.jsonl:13: the last line is torn off at column 12", "Correct the record"),
    "no records": ("strings.jsonl", "strings.jsonl:1: str, not an object with fields", "A record is an obj"),
    "other columns": ("other.csv", '{"question": "a", "reply": "b"}.', "columns: {prompt: question, comp"),
    "nothing left": ("{path: train.jsonl, skip: 12}", "leaves out all of its 12 good", "a smaller skip"),
    "another kind of file": ("file", "file has a suffix of no kind of data file", "Convert it to one of"),
    "unknown format": (
        "{path: train.jsonl, format: alpacca}", "no data format is called 'alpacca'", "'alpaca'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stage", ["tune", "evaluate"])
@pytest.mark.parametrize("name", DATA)
def test_data_of_a_recipe(luthier, stage, name):
    """Told by `run` before a model is loaded."""
    spec, found, fix = DATA[name]
    result = luthier("run", f"{stage}.yaml", f"{stage}.data={spec}")
    assert found in result.refusal()
    assert fix in result.refusal()
    assert "because" not in result.err, "no stage has begun"
    assert luthier("plan", f"{stage}.yaml", f"{stage}.data={spec}").refusal() == result.refusal()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("show", "trian.jsonl"), ("There is no data file", "trian.jsonl", "Did you mean train.jsonl")),
        (("check", "empty.jsonl"), ("empty.jsonl is empty",)),
        (("check", "train.jsonl", "--column", "prompt=promt"), ("no column 'promt'", "'prompt'?")),
        (("show", "train.jsonl", "--column", "promt=prompt"), ("'promt' is no field", "'prompt'?")),
        (("show", "train.jsonl", "--column", "prompt"), ("is not OURS=THEIRS", "--column prompt=question")),
        (("show", "train.jsonl", "--format", "alpacca"), ("called 'alpacca'", "Did you mean 'alpaca'")),
        (("check", "latin.csv"), ("latin.csv:3: byte 25",)),
        (("check", "train.jsonl", "--model", "bsae"), ("no model 'bsae'", "Did you mean 'base'?")),
        (("show", "train.jsonl", "--start", "99"), ("has 12 rows", "smaller --start")),
        (("show", "file"), ("suffix of no kind of data file", ".jsonl")),
        (("show", "train.jsonl", "--model", "no_tokens"), ("tokenizer of 'no_tokens'", "Copy or save")),
        (("tickets", "file"), ("Cannot write in file", "Choose another folder")),
    ],
)
def test_a_file_on_its_own(luthier, words, expected):
    refusal = luthier("data", *words).refusal()
    assert all(text in refusal for text in expected), refusal


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unanswered", "'completion' is missing"),
        ("blank", "'completion' is empty"),
        ("latin", "is not UTF-8"),
        ("torn", "the last line is torn off"),
    ],
)
def test_a_check_lists_bad_records_and_ends_with_status_1(luthier, monkeypatch, name, reason):
    monkeypatch.setenv("COLUMNS", "200")
    result = luthier("data", "check", f"{name}.jsonl")
    assert result.status == 1
    assert f"{name}.jsonl:13" in result.out
    assert reason in result.out


@pytest.mark.parametrize(
    ("words", "choices"),
    [
        (("data", "show", "train.jsonl", "--train-on", "asistant"), "'assistant_all'"),
        (("data", "check", "train.jsonl", "--chat", "maybe"), "'auto'"),
        (("data", "show", "train.jsonl", "--max-length", "-1"), "greater than or equal to 1"),
        (("run", "tune.yaml", "--frm", "tune"), "--from"),
        (("validat", "tune.yaml"), "Did you mean 'validate'"),
    ],
)
def test_options_name_their_choices(luthier, words, choices):
    result = luthier(*words)
    assert result.status == 2
    assert choices in result.err
    assert "Traceback" not in result.err


class TestRecordOf200000Characters:
    def test_is_named_by_training_with_the_length_that_keeps_it(self, luthier):
        refusal = luthier("run", "tune.yaml", "tune.data=long.jsonl").refusal()
        assert "1 of 13 examples lose all their trained tokens" in refusal
        assert "max_length 128; the first is long.jsonl:13" in refusal
        assert "Set max_length to" in refusal
        assert "allow_empty: true in the objective" in refusal

    def test_is_not_to_be_kept_by_a_length_that_the_model_lacks(self, luthier, place, tmp_path):
        tokenizer = tiny.tokenizer()
        tokenizer.model_max_length = 256
        save(tiny.llama(), tmp_path / "short", tokenizer)
        result = luthier("run", "tune.yaml", "tune.data=long.jsonl", f"model={tmp_path / 'short'}")
        assert "The model takes 256 tokens: shorten these examples, or leave" in result.refusal()
        assert "emptied examples" not in result.err, "the error says it"

    @pytest.mark.parametrize("model", ["base", "gpt2"])
    def test_is_cut_to_what_the_model_takes_at_most(self, luthier, model):
        """GPT-2 has no position after its last: torch would end in an IndexError."""
        words = ("run", "tune.yaml", f"model={model}", "tune.data=long_answer.jsonl")
        refusal = luthier(*words, "tune.objective.max_length=600").refusal()
        assert "The longest example has 600 tokens, and" in refusal
        assert "Write max_length: 256 in the objective" in refusal

    def test_is_named_by_evaluation_with_the_context_that_it_exceeds(self, luthier):
        refusal = luthier("run", "evaluate.yaml", "evaluate.data=long.jsonl").refusal()
        assert "The prompt of long.jsonl:13 has 120012 tokens, the model's context 256" in refusal

    def test_is_listed_by_a_check(self, luthier):
        result = luthier("data", "check", "long.jsonl", "--model", "base", "--max-length", 128)
        assert result.status == 1
        assert "Without a label: long.jsonl:13" in result.out


OVERRIDES = [
    ("tune.method=lorra", "There is no method 'lorra' in tuning", "'lora'"),
    ("tune.method.r=-1", "stages.0.tune.method.r must be >= 1, not -1", "rank of the update"),
    ("tune.method.r=many", "stages.0.tune.method.r must be int, not 'many'", "rank"),
    ("tune.method.rr=4", "lora has no option 'rr'", "'r'"),
    ("tune.method.lora_dropout=1.5", "must be >= 0 and < 1, not 1.5", "dropout"),
    ("tune.training.max_steps=-5", "max_steps must be at least -1, not -5", ""),
    ("tune.training.max_steps=0", "max_steps must be at least 1, or -1 to count epochs, not 0", ""),
    ("tune.training.learning_rate=-1", "learning_rate must be at least 0, not -1", ""),
    ("tune.training.lerning_rate=1", "unknown key 'lerning_rate'", "'learning_rate'"),
    ("tune.training.save_strategy=sometimes", "must be one of no, steps, epoch, best, not 'sometimes'", ""),
    ("tune.training.report_to=wandbb", "'wandbb' is no tracker to report to", "Did you mean 'wandb'"),
    ("tune.training.report_to=[none, clearmi]", "'clearmi' is no tracker", "Did you mean 'clearml'?"),
    ("tune.objective=stf", "There is no method 'stf' in alignment", "'sft'"),
    ("tune.data=trian.jsonl", "there is no data file trian.jsonl", "'train.jsonl'"),
    ("model=bsae", "There is no model 'bsae'", "Did you mean 'base'?"),
    ("model=./bsae", "Model './bsae' does not exist", "Did you mean 'base'?"),
    ("model=someone/nothing", "There is no model 'someone/nothing'", "(smollm2-135m, minilm)"),
    ("model.dtype=float31", "model.dtype must be 'auto', 'float32'", "Did you mean 'float32'"),
    ("model.device=cudda", "model.device must be a device, not 'cudda'", "Did you mean 'cuda'?"),
    ("model.attn=spda", "must be an implementation of attention, not 'spda'", "Did you mean 'sdpa'?"),
    ("seed=-1", "seed must be greater than or equal to 0, not -1", ""),
    ("sed=1", "nothing in the recipe is called 'sed'", "Did you mean 'seed'?"),
    ("tune.method.r", "is not key=value", "Write tune.training.max_steps=20"),
    ("stages.7.tune.method=lora", "'stages' is a list of 1, counted from 0; it has no '7'", ""),
    ("tune.data=''", "'stages.0.tune.data.path' is empty", "path: File (jsonl, json"),
    ("tune.data=[a, b]", "stages.0.tune.data must be a path or a mapping of keys, not ['a', 'b']", ""),
    ("model=[a]", "model must be a name or a mapping of keys", ""),
    ("tune.objective.train_on=user", "must be one of assistant_all, assistant_last, completion, all,", ""),
    ("tune.objective.packing=maybe", "must be one of true, false, auto, rows, not 'maybe'", ""),
    ("model.revision=main", "revision has no effect: base is not on the Hub", "Leave it out"),
    ("model.num_labels=3", "num_labels has no effect on a causal model", "task: classification"),
    ("methods=[tune.yaml]", "tune.yaml is no method file: SyntaxError", ""),
    ("tune.method=[lora", "its value is not YAML", ""),
]


@pytest.mark.parametrize(("override", "found", "fix"), OVERRIDES, ids=[o[0] for o in OVERRIDES])
def test_overrides(luthier, override, found, fix):
    refusal = luthier("validate", "tune.yaml", override).refusal()
    assert refusal.startswith(f"override '{override}': ")
    assert found in refusal
    assert fix in refusal
    assert luthier("run", "tune.yaml", override).refusal() == refusal


def test_a_tracker_that_is_not_installed(luthier, monkeypatch):
    """Told before anything is loaded: the trainer would end in a traceback, with the model in memory."""
    monkeypatch.setattr("luthier.alignment.trackers._there", lambda module: False)
    for report_to, found in [
        ("wandb", "The tracker wandb is not installed. pip install wandb, or leave 'wandb' out"),
        ("[none, comet_ml]", "The tracker comet_ml is not installed. pip install comet-ml, or"),
    ]:
        override = f"tune.training.report_to={report_to}"
        refusal = luthier("validate", "tune.yaml", override).refusal()
        assert f"override '{override}': {found}" in refusal
        result = luthier("run", "tune.yaml", override)
        assert result.refusal() == refusal
        assert "because" not in result.err, "no stage has begun"


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("max_new_tokens=-3", "generation.max_new_tokens must be at least 1, not -3"),
        ("max_new_tokens=many", "generation.max_new_tokens must be int, not 'many'"),
        ("num_beams=0", "generation.num_beams must be at least 1, not 0"),
        ("max_new_token=4", "Did you mean 'max_new_tokens'"),
        ("num_return_sequences=2", "each prompt gets one answer"),
    ],
)
def test_settings_of_generation(luthier, setting, found):
    assert found in luthier("validate", "evaluate.yaml", f"evaluate.generation.{setting}").refusal()


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("tune.training.lr_scheduler_type=cosine_with_min_lr", "One of min_lr or min_lr_rate should be set"),
        ("tune.training.adam_beta1=2", "Invalid beta parameter"),
        ("tune.training.lr_scheduler_kwargs={min_lr: 1}", "unexpected keyword argument 'min_lr'"),
        ("tune.training.fsdp=full_shard", "Using fsdp only works in distributed training"),
        ("tune.training.push_to_hub=true", "The trainer cannot be made of these training arguments"),
    ],
)
def test_what_only_transformers_can_judge_is_told_in_its_words(luthier, override, found):
    assert found in luthier("run", "tune.yaml", override).refusal()


def test_sampling_that_only_transformers_can_judge(luthier):
    setting = "evaluate.generation={do_sample: true, temperature: 0, max_new_tokens: 4}"
    assert "strictly positive" in luthier("run", "evaluate.yaml", setting).refusal()


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_targets_that_match_nothing(luthier, verb):
    refusal = luthier(verb, "tune.yaml", "tune.method.target_modules=[q_proj, vproj]").refusal()
    assert "Target 'vproj' matches no layer of LlamaForCausalLM. Did you mean 'v_proj'" in refusal


def test_a_device_that_is_not_on_this_machine(luthier, monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available=False: None)
    refusal = luthier("plan", "tune.yaml", "model.device=cuda:1").refusal()
    assert "Device 'cuda:1' is not available (found: cpu only). Write device: auto." in refusal


class TestRecipeFile:
    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("name: demo\nmodel: [base\nstages:\n", "r.yaml:3: not YAML: expected ',' or ']'"),
            ("name: demo\n\tmodel: base\n", "r.yaml:2: not YAML: found character '\\t'"),
            ("name: demo\nmodel: base\n stages: []\n", "r.yaml:3: not YAML: mapping values"),
            ("- tune\n", "r.yaml is not a mapping of keys. A recipe begins with 'name: ...'"),
            (TUNE.replace("r: 4", "r: -1"), "r.yaml:6: stages.0.tune.method.r must be >= 1, not -1"),
            (TUNE.replace("lora", "lorra"), "r.yaml:6: There is no method 'lorra' in tuning. Did you mean"),
            (TUNE.replace("name: base", "name: ./bsae"), "r.yaml:2: Model './bsae' does not exist"),
            (TUNE.replace("device: cpu", "device: cpuu"), "r.yaml:2: model.device must be a device, not"),
            (TUNE.replace("  - tune", "  - tuen"), "r.yaml:4: unknown key 'tuen' in stages.0. Did you"),
        ],
    )  # fmt: skip
    def test_is_refused_with_its_line(self, luthier, tmp_path, text, found):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        for verb in ("validate", "plan", "run"):
            assert found in luthier(verb, path).refusal().replace(str(path), "r.yaml")

    def test_that_is_not_there_names_the_nearest(self, luthier):
        assert "Did you mean 'tune.yaml'?" in luthier("run", "tun.yaml").refusal()

    def test_that_is_a_folder(self, luthier, place):
        assert "base is a folder, not a recipe" in luthier("run", "base").refusal()
        assert "Give one of its files: evaluate.yaml, tune.yaml." in luthier("run", ".").refusal()

    def test_all_faults_are_told_at_once(self, luthier, tmp_path):
        path = tmp_path / "r.yaml"
        path.write_text(TUNE.replace("r: 4", "r: -1").replace("max_steps", "max_step"))
        result = luthier("validate", path)
        assert result.status == 2
        assert "has 2 faults" in result.err
        assert f"{path}:6: " in result.err
        assert f"{path}:8: " in result.err
        assert "Traceback" not in result.err


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def test_a_model_of_another_task(luthier):
    refusal = luthier("run", "tune.yaml", "model=bert").refusal()
    assert refusal.endswith("It was saved for classification: write task: classification.")


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_damaged_tokenizer(luthier, verb):
    refusal = luthier(verb, "tune.yaml", "model=no_tokens").refusal()
    assert "no_tokens/tokenizer.json cannot be read" in refusal


def test_a_method_that_is_not_named(luthier):
    assert "Write luthier methods show lora" in luthier("methods", "show").refusal()


class TestDamagedFiles:
    def test_a_flipped_byte_in_the_base_model(self, luthier, place, tmp_path):
        shutil.copytree(place / "base", tmp_path / "flipped")
        flip(tmp_path / "flipped" / "model.safetensors")
        refusal = luthier("run", "tune.yaml", f"model={tmp_path / 'flipped'}").refusal()
        assert f"{tmp_path / 'flipped' / 'model.safetensors'} is not as it was saved" in refusal
        assert "Copy or save it again" in refusal

    @pytest.mark.parametrize(
        "file", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"]
    )
    def test_a_flipped_byte_in_a_checkpoint(self, luthier, tmp_path, monkeypatch, file):
        """Without its record the run would go on from wrong numbers, or end in a traceback."""
        straight = callbacks.Divergence.on_step_end

        def stop(self, args, state, control, **kwargs):
            straight(self, args, state, control, **kwargs)
            if state.global_step == 5:
                raise TrainingError("The power went.")

        with monkeypatch.context() as patch:
            patch.setattr(callbacks.Divergence, "on_step_end", stop)
            assert "The power went." in luthier("run", "tune.yaml").refusal()
        checkpoint = tmp_path / "runs/demo/01-tune.partial/checkpoints/checkpoint-4"
        flip(checkpoint / file)
        refusal = luthier("run", "tune.yaml").refusal()
        assert f"{checkpoint / file} is not as it was saved" in refusal
        assert f"Delete the folder {checkpoint} to go on from checkpoint-2." in refusal
        shutil.rmtree(checkpoint)
        result = luthier("run", "tune.yaml")
        assert result.status == 0
        assert "goes on from checkpoint-2" in result.err


class TestDisk:
    @pytest.mark.parametrize("words", [("--output", "file"), ("output=file/deeper",)])
    def test_a_file_where_a_folder_is_needed(self, luthier, place, words):
        refusal = luthier("run", "tune.yaml", *words).refusal()
        assert f"{place / 'file'} is a file. Choose another folder with --output." in refusal

    def test_a_folder_without_permission(self, luthier, tmp_path, monkeypatch):
        """Nothing is forbidden to root, so that the system's answer is given here."""

        def refuse(*args, dir, **kwargs):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
        refusal = luthier("run", "tune.yaml").refusal()
        assert f"Cannot write in {tmp_path}: Permission denied." in refusal
        assert "--output" in refusal

    def test_files_that_may_not_be_read(self, luthier, monkeypatch):
        """It would be told as a folder that cannot be written."""

        def refuse(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr("luthier.files.hash_file", refuse)
        monkeypatch.setattr("luthier.recipe.manifest._hashes", {})
        assert "cannot be read: Permission denied." in luthier("run", "evaluate.yaml").refusal()

    def test_a_cache_without_permission(self, luthier, place, monkeypatch):
        (place / "model.gguf").write_bytes(b"GGUF")
        monkeypatch.setenv("LUTHIER_CACHE", str(place / "file"))
        with pytest.raises(ResourceError, match=r"Cannot write in .*file/models") as caught:
            gguf.converted(sources.Source("model.gguf", "gguf", place, gguf_file="model.gguf"))
        assert "LUTHIER_CACHE" in caught.value.fix

    def test_a_schema_or_a_report_that_cannot_be_written(self, luthier, monkeypatch, tmp_path):
        assert "Choose another file with --out" in luthier("schema", "--out", "file/x.json").refusal()

        def refuse(folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

        monkeypatch.setattr("luthier.report.report.write_report", refuse)
        assert f"Cannot write in {tmp_path}: Permission denied" in luthier("report", tmp_path).refusal()

    @pytest.mark.parametrize("verb", ["plan", "run"])
    def test_too_small_for_the_run(self, luthier, monkeypatch, verb):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
        refusal = luthier(verb, "tune.yaml").refusal()
        assert "1.0 kB free" in refusal
        assert "save_total_limit: 1" in refusal

    def test_full_from_the_first_file_on(self, luthier, monkeypatch):
        monkeypatch.setattr("os.fsync", no_space)
        assert "The disk is full" in luthier("run", "tune.yaml").refusal()

    def test_full_when_the_adapter_is_saved(self, luthier, tmp_path, monkeypatch):
        """What is done is kept: with space again, the same command goes on from its checkpoint."""

        def fill(*_):
            patch.setattr("os.fsync", no_space)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        with monkeypatch.context() as patch:
            patch.setattr("luthier.models.saving.save_adapter", fill)
            refusal = luthier("run", "tune.yaml").refusal()
        assert f"The disk is full: writing in {tmp_path / 'runs/demo/01-tune.partial'}" in refusal
        assert "start the same command again" in refusal
        result = luthier("run", "tune.yaml")
        assert result.status == 0
        assert "goes on from checkpoint-6" in result.err


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("debug", [("--debug", "validate"), ("validate",)])
def test_the_traceback_is_there_for_who_asks(luthier, debug):
    result = luthier(*debug, "tune.yaml", "tune.method.r=-1")
    assert result.status == 2
    assert ("Traceback (most recent call last)" in result.err) == (len(debug) == 2)
    assert "error: override 'tune.method.r=-1'" in result.err
