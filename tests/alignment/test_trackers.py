"""Trackers are those of transformers, and what one lacks is what transformers would look for."""

import pytest

from luthier.alignment import trackers


def test_the_names_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(trackers.names()) == set(INTEGRATION_TO_CALLBACK)


def test_what_transformers_finds_here_is_not_missing_and_the_rest_is(monkeypatch):
    from transformers.integrations import integration_utils as theirs

    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    check = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
    for name in trackers.names():
        there = getattr(theirs, f"is_{check.get(name, name)}_available")()
        assert (trackers.missing(name) is None) == there, name


@pytest.mark.parametrize(
    ("installed", "report_to", "lacks"),
    [
        (set(), "wandb", "pip install wandb,"),
        ({"wandb"}, "wandb", None),
        (set(), ["all", "none"], None),
        (set(), None, None),
        ({"tensorboardX"}, "tensorboard", None),
        (set(), "tensorboard", "pip install tensorboard,"),
        ({"mlflow"}, "dagshub", "pip install dagshub,"),
        (set(), "dagshub", "pip install dagshub mlflow,"),
        (set(), "azure_ml", "pip install azureml-sdk,"),
        ({"wandb"}, ["wandb", "comet_ml"], "pip install comet-ml,"),
    ],
)
def test_what_is_missing_is_told_with_what_to_install(monkeypatch, installed, report_to, lacks):
    monkeypatch.setattr(trackers, "_there", lambda module: module in installed)
    found = trackers.missing(report_to)
    assert (found is None) if lacks is None else found[1].startswith(lacks)


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    assert "KUBEFLOW_TRAINER_SERVER_URL" in trackers.missing("kubeflow")[0]
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://here")
    assert trackers.missing("kubeflow") is None


def test_a_module_inside_a_package_that_is_not_there_is_not_there():
    assert not trackers._there("no_such_package.inside")
    assert trackers._there("json.decoder")
