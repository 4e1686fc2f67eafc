"""What a user says about a data set: where it lies, what its rows mean, what happens to bad ones."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import CoreSchema, PydanticCustomError

from luthier.data.formats import CANONICAL_FIELDS, FORMATS
from luthier.errors import did_you_mean


class DataSpec(BaseModel):
    """A data set. Written as a plain string it is the path of a file or folder, or a Hub id."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    path: str = Field(min_length=1)
    """File (jsonl, json, csv, tsv, parquet, txt, each also .gz), folder of such files, or Hub id."""
    format: str = "auto"
    """What a row means; by default detected from its fields and shown."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our field to the file's column, such as {prompt: question, completion: answer}."""
    on_bad: Literal["strict", "quarantine"] = "strict"
    """Stop at the first bad record, or write bad records with reasons to NAME.rejected.jsonl and go on."""
    max_bad: float = Field(0.05, ge=0, le=1)
    """With quarantine: the share of bad records above which loading stops all the same."""
    skip: int = Field(0, ge=0)
    """Leave out the first so many good records, those that `limit` takes elsewhere."""
    limit: int | None = Field(None, ge=1)
    """Use the first so many good records only, after those of `skip`."""
    duplicates: Literal["keep", "drop"] = "keep"
    """What happens to exact copies of a record. They are counted either way."""
    allow_leakage: bool = False
    """Go on where a training prompt is in the evaluation data too."""
    split: str | None = None
    """Split of a Hub data set, or the name (train, test, ...) that picks files of a folder."""
    subset: str | None = None
    """Subset (configuration) of a Hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    header: bool | None = None
    """Whether a CSV/TSV file starts with column names; by default it is looked at. Without: '0', '1', ..."""
    rows: Literal["file", "paragraph", "line"] = "file"
    """What one record of a plain text file is."""
    separator: str | None = Field(None, min_length=1)
    """Splits each line of a plain text file into prompt and completion."""
    template: Literal["plain", "alpaca"] = "plain"
    """How an Alpaca row becomes a prompt: instruction and input, or the 'Below is an instruction' wrapper."""
    alpaca_join: str = "\n\n"
    """What stands between instruction and input of an Alpaca row."""
    merge_consecutive: bool = False
    """Join neighbouring turns of the same role instead of rejecting the conversation."""
    neutral: Literal["positive", "negative"] = "positive"
    """What a step rated 0 counts as in PRM800K (positive: Lightman et al., 2023)."""
    min_gap: float = Field(0.0, ge=0)
    """Least difference of scores that makes a preference out of scored completions."""
    labels: list[str] | None = Field(None, min_length=2)
    """Class names in order, for classification; by default those found, sorted."""
    base: SkipJsonSchema[Path | None] = Field(None, exclude=True, repr=False)
    """Folder (the recipe's) where a relative path is looked for after the current folder."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": str(value)} if isinstance(value, str | Path) else value

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        if name != "auto" and name not in FORMATS:
            fix = did_you_mean(name, ["auto", *FORMATS])
            raise PydanticCustomError(
                "luthier", "{message}", {"message": f"no data format is called '{name}'", "fix": fix}
            )
        return name

    @field_validator("columns")
    @classmethod
    def _known_fields(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in CANONICAL_FIELDS:
                message = f"'{name}' is no field of ours; columns maps our field to the file's column"
                fix = did_you_mean(name, CANONICAL_FIELDS)
                raise PydanticCustomError("luthier", "{message}", {"message": message, "fix": fix})
        return columns

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "description": "File, folder or Hub id."}, handler(core)]}
