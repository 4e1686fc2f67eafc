"""Gradual unfreezing: stages, discriminative rates and the slanted triangle, through a real trainer."""

from itertools import pairwise

import pytest
import small_training as training
import tiny
import torch
from transformers import Trainer, TrainerCallback

from luthier import checks, method
from luthier.errors import MethodError
from luthier.tuning import hooks
from luthier.tuning.attach import attach
from luthier.tuning.groups import slanted_triangle, trained_names

# Highest first, as the model's tree shows them.
GROUPS = ["norm", "layers.1", "layers.0", "embed_tokens"]


def gradual(model, **options):
    return attach(model, method("gradual_unfreezing")(**{"unit": "step", "unfreeze_every": 2} | options))


class Watch(TrainerCallback):
    """What is open, and at which rates, at each step."""

    def __init__(self):
        self.open, self.rates, self.adam = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        names = trained_names(model)
        self.open.append([any(group in name for name in names) for group in GROUPS])
        self.rates.append({group["layer"]: group["lr"] for group in optimizer.param_groups})

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        steps = [optimizer.state[p]["step"].item() for p in model.parameters() if p in optimizer.state]
        self.adam.append(sorted(set(steps)))


def watched(model, folder, **changes):
    trainer = training.trainer(model, folder, **changes)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    return watch, trainer


@pytest.mark.parametrize("total", [10, 995, 1000])
def test_triangle_starts_and_ends_at_the_lowest_rate_and_peaks_at_the_cut(total):
    values = [slanted_triangle(t, total) for t in range(total + 1)]
    cut = total // 10
    assert values[0] == values[-1] == pytest.approx(1 / 32)
    assert values[cut] == 1
    assert values[: cut + 1] == sorted(values[: cut + 1])
    assert values[cut:] == sorted(values[cut:], reverse=True)
    assert min(values) >= 1 / 32 - 1e-12


def test_triangle_is_the_papers_where_its_cut_is_whole():
    cut = 100
    for t in range(1001):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / 0.1 - 1))
        assert slanted_triangle(t, 1000) == pytest.approx((1 + p * 31) / 32, abs=1e-9)


def test_triangle_of_few_steps_divides_by_no_zero():
    assert [slanted_triangle(t, 1) for t in (0, 1)] == pytest.approx([1 / 32, 1])


def test_each_stage_opens_exactly_the_next_group_and_its_adam_state_is_fresh(tmp_path):
    watch, _ = watched(gradual(tiny.llama()), tmp_path, max_steps=8)
    expected = [[group < 1 + step // 2 for group in range(4)] for step in range(8)]
    assert watch.open == expected
    # After step 2s + 1 the groups have made 2s + 2, 2s, ..., 2 steps, the last opened the fewest.
    assert watch.adam[-1] == [2, 4, 6, 8]


@pytest.mark.parametrize("decay", [0.95, 1 / 2.6])
def test_neighbouring_rates_keep_their_ratio_at_every_step(decay, tmp_path):
    model = gradual(tiny.llama(), layer_lr_decay=decay)
    watch, _ = watched(model, tmp_path, max_steps=6)
    for rates in watch.rates:
        above = ["head", "block 1", "block 0", "embeddings"]
        for high, low in pairwise(above):
            assert rates[low] / rates[high] == pytest.approx(decay, rel=1e-6)


def test_schedule_is_a_triangle_in_every_stage(tmp_path):
    model = gradual(tiny.llama(), unfreeze_every=5, stages=[1, "all"])
    watch, trainer = watched(
        model, tmp_path, max_steps=15, learning_rate=1.0, logging_strategy="steps", logging_steps=1
    )
    found = [rates["head"] for rates in watch.rates]
    stages = [slanted_triangle(t, 5) for t in range(5)] + [slanted_triangle(t, 10) for t in range(10)]
    assert found == pytest.approx(stages)
    # The trainer's log shows the rate of its first group, the embeddings, as it really was.
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([rates["embeddings"] for rates in watch.rates])


def test_one_triangle_over_the_run(tmp_path):
    watch, _ = watched(gradual(tiny.llama(), schedule="stlr"), tmp_path, max_steps=8, learning_rate=1.0)
    assert [r["head"] for r in watch.rates] == pytest.approx([slanted_triangle(t, 8) for t in range(8)])


def test_all_open_from_the_start_is_full_fine_tuning(tmp_path):
    options = {"stages": ["all"], "layer_lr_decay": 1.0, "schedule": "trainer"}
    model = training.train(gradual(tiny.gpt2(), **options), tmp_path)
    plain = training.train(attach(tiny.gpt2(), method("full")()), tmp_path)
    for name, tensor in training.weights(plain).items():
        assert torch.allclose(tensor, model.get_parameter(name), rtol=0, atol=1e-6), name


def test_stages_count_epochs(tmp_path):
    model = gradual(tiny.llama(), unit="epoch", unfreeze_every=1)
    # 8 rows by 2: four steps an epoch, the last batch of an uneven epoch counts.
    watch, _ = watched(model, tmp_path, max_steps=-1, num_train_epochs=4)
    assert [sum(now) for now in watch.open] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4


def test_resume_inside_a_stage_restores_what_is_open(tmp_path):
    saving = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    training.train(gradual(tiny.llama()), tmp_path, **saving)
    model = gradual(tiny.llama())
    trainer = training.trainer(model, tmp_path, **saving)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert [sum(now) for now in watch.open] == [3, 4, 4]


def test_an_optimiser_that_lacks_later_groups_is_refused(tmp_path):
    model = gradual(tiny.llama())
    plain = Trainer(
        model=model,
        args=training.arguments(tmp_path),
        train_dataset=training.rows(model),
        callbacks=hooks.callbacks(model),
    )
    with pytest.raises(MethodError, match="not in the optimiser"):
        plain.train()


def test_a_run_too_short_to_open_all_says_so(tmp_path):
    with checks.collect() as lines:
        training.train(gradual(tiny.llama()), tmp_path, max_steps=4)
    line = next(line for line in lines if "stage" in line.name)
    assert (line.passed, line.value, line.tolerance) == (False, 2, 4)


@pytest.mark.parametrize("stages", [[], [0, 1], [2, 1], [9], ["some"]])
def test_stages_that_are_no_growing_list_are_refused(stages):
    with pytest.raises(MethodError, match="growing list"):
        gradual(tiny.llama(), stages=stages)
