"""PEFT knows our types by name alone, imports a file when it needs it, and keeps its own names."""

import copy
import pickle
from dataclasses import dataclass

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.ln_tuning import LNTuningModel

from luthier import taxonomy
from luthier.errors import MethodError
from luthier.models import loading
from luthier.tuning import registration

METHOD = '''"""A method.

Paper: nobody, 2026.
Pick it when testing.
Family: tuning/lowrank
"""

from dataclasses import dataclass

import peft
from peft.tuners.ln_tuning import LNTuningModel

from luthier.tuning.registration import register, registered_type


@dataclass
class Config(peft.PeftConfig):
    size: int = 1

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = registered_type(type(self))


class Tuner(LNTuningModel):
    prefix = "mine_"


register("mine", Config, Tuner)
'''


@pytest.fixture(autouse=True)
def forget():
    """Takes the types away again that a test adds."""
    tables = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING)
    tables = (*tables, registration._ours, PeftType._member_map_, PeftType._value2member_map_)
    before, names = [dict(table) for table in tables], list(PeftType._member_names_)
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)
    PeftType._member_names_[:] = names


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(METHOD)
    added = dict(taxonomy._added)
    yield taxonomy.add_file(path)
    taxonomy._added.clear()
    taxonomy._added.update(added)


class Tuner(LNTuningModel):
    prefix = "one_"


@dataclass
class Config(peft.PeftConfig):
    pass


def test_a_type_is_a_member_like_those_of_peft():
    registration.register("one", Config, Tuner)
    member = PeftType("ONE")
    assert member is PeftType["ONE"] is registration.registered_type(Config)
    assert member == "ONE"
    assert member.value == "ONE"
    assert member in list(PeftType)
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member
    assert PEFT_TYPE_TO_CONFIG_MAPPING["ONE"] is Config
    assert PEFT_TYPE_TO_TUNER_MAPPING["ONE"] is Tuner
    assert PEFT_TYPE_TO_PREFIX_MAPPING["ONE"] == "one_"


def test_a_class_below_a_registered_one_has_its_type():
    registration.register("one", Config, Tuner)
    assert registration.registered_type(type("Below", (Config,), {})) == "ONE"
    assert registration.is_ours("ONE")
    assert not registration.is_ours("LORA")


def test_a_config_that_nobody_registered_is_refused():
    with pytest.raises(MethodError, match=r"not registered.*register\(name, Config, Tuner\)"):
        registration.registered_type(Config)


def test_a_name_of_pefts_is_refused():
    with pytest.raises(MethodError, match=r"'lora', a name that peft\.tuners\.lora\.config has"):
        registration.register("lora", Config, Tuner)


def test_a_name_of_another_file_is_refused_but_a_new_import_is_not():
    registration.register("one", Config, Tuner)
    registration.register("one", Config, Tuner)
    other = type("Other", (Config,), {})
    with pytest.raises(MethodError, match="'one'"):
        registration.register("one", other, Tuner)


def test_the_name_is_read_without_importing(mine):
    assert registration.declared(mine) == "mine"
    assert registration.declared(taxonomy.find("lora")) == ""


def test_peft_imports_the_file_when_it_asks_for_the_config(mine, tmp_path):
    registration.register_all()
    assert isinstance(PEFT_TYPE_TO_CONFIG_MAPPING["MINE"], registration.Deferred)
    assert registration.is_ours("MINE")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "MINE", "size": 3, "of_tomorrow": 1}')
    with pytest.warns(UserWarning, match="of_tomorrow"):
        config = peft.PeftConfig.from_pretrained(tmp_path)
    assert config.size == 3
    assert PEFT_TYPE_TO_CONFIG_MAPPING["MINE"] is type(config)


def test_the_house_loads_adapters_of_a_file_that_was_added_late(mine, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "MINE", "task_type": "SEQ_CLS"}')
    assert loading._task_of(tmp_path) == "classification"


def test_a_deferred_class_answers_as_the_class(mine, tmp_path):
    registration.register_all()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "MINE", "size": 3}')
    assert PEFT_TYPE_TO_CONFIG_MAPPING["MINE"].from_pretrained(tmp_path).size == 3
