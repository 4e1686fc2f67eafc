"""Trackers that `report_to` names: which there are, and what one needs. Loads neither torch nor a tracker.

The names are those of the installed transformers. Its trainer looks for the tracker's package only after the
model is loaded, and ends in a traceback where it is missing.
"""

import importlib.util
import os
from functools import cache
from typing import Any

from luthier.errors import did_you_mean
from luthier.installed import keys_of, source

# Modules of a tracker whose name is not that of its module: of each group one must be there.
_MODULES: dict[str, tuple[tuple[str, ...], ...]] = {
    "azure_ml": (("azureml.core.run",),),
    "dagshub": (("dagshub",), ("mlflow",)),
    "flyte": (("flytekit",),),
    "kubeflow": (),
    "tensorboard": (("tensorboard", "tensorboardX"),),
}
# Packages to install, where the name is not that of the module.
_PACKAGES = {"azureml.core.run": "azureml-sdk", "comet_ml": "comet-ml"}
_VARIABLES = {"kubeflow": "KUBEFLOW_TRAINER_SERVER_URL"}  # set by what starts the training

Fault = tuple[str, str]  # what is wrong, what to do


@cache
def names() -> tuple[str, ...]:
    """The trackers that the installed transformers knows."""
    tree = source("transformers", "integrations/integration_utils.py")
    return keys_of(tree.body, "INTEGRATION_TO_CALLBACK")


def asked(report_to: Any) -> list[str]:
    """The trackers that a value of `report_to` names; 'all' are those that are installed."""
    given = [report_to] if isinstance(report_to, str) else report_to or []
    return [name for name in given if name not in ("all", "none")]


def unknown(report_to: Any) -> Fault | None:
    """Why a value of `report_to` names no tracker, or None."""
    choices = ("all", "none", *names())
    for name in asked(report_to):
        if name not in choices:
            return f"{name!r} is no tracker to report to", did_you_mean(str(name), choices)
    return None


def missing(report_to: Any) -> Fault | None:
    """What is not there of the trackers that a value of `report_to` names, or None."""
    for name in asked(report_to):
        groups = _MODULES.get(name, ((name,),))
        absent = [group[0] for group in groups if not any(map(_there, group))]
        if absent:
            packages = " ".join(_PACKAGES.get(module, module) for module in absent)
            return (
                f"The tracker {name} is not installed",
                f"pip install {packages}, or leave '{name}' out of report_to.",
            )
        variable = _VARIABLES.get(name)
        if variable and variable not in os.environ:
            fix = f"Start the run where it is set, or leave '{name}' out of report_to."
            return f"The tracker {name} needs the environment variable {variable}", fix
    return None


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is not there
        return False
