"""Every tuning method on tiny models: which there are, with what options, on what base."""

import fused_sources
import quantised_models
import torch

import luthier
from luthier import taxonomy

# Those that train; searches have invariants of their own.
METHODS = [m.name for m in taxonomy.serving("tuning") if m.origin == "luthier" and not m.searches]
# Sizes that suit two blocks.
OPTIONS = {
    "top_layers": {"k": 1},
    "frozen_bottom": {"n": 1},
    "linear_probe": {"untie_head": True},
    "gradual_unfreezing": {"unit": "step", "groups_per_stage": 4},
    "serial": {"bottleneck_dim": 8},
    "parallel": {"bottleneck_dim": 8},
    "coda": {"bottleneck_dim": 8},
    "kadaptation": {"phm_dim": 4},
    "autolora": {"search_steps": 2},
}
# Options that depend on the model.
MADE_FOR = {"fusion": lambda make: {"adapters": fused_sources.pfeiffer(make)}}
# Methods that want a base that is held in another way.
BASES = {"qlora": quantised_models.load, "peqa": quantised_models.rounded}


def config(name, make=None, **options):
    """The method's config for the model that `make` builds."""
    made_for = MADE_FOR[name](make) if make is not None and name in MADE_FOR else {}
    return luthier.method(name)(**OPTIONS.get(name, {}) | made_for | options)


def base(name, make, dtype="float32"):
    """The model that `make` builds, as the method wants it."""
    return BASES[name](make, dtype=dtype) if name in BASES else make().to(getattr(torch, dtype))
