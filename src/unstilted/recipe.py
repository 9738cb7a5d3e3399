"""The recipe: every setting of a run, one table a stage, read from TOML and refused when anything in it is unknown."""

import difflib
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from unstilted.errors import UserError

STYLE_PROMPT = (
    "Talk like a thoughtful person in a casual chat, not like an official form. Use plain words, contractions and short "
    "sentences of different lengths, speak to the reader directly, say the useful thing first, and stay on topic. "
    "Never pretend to be human."
)

LossName = Literal["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "simpo", "orpo"]
WITHOUT_LABEL_SMOOTHING: tuple[LossName, ...] = ("hinge", "ipo", "orpo")
"""Losses that have no form for pairs whose two sides are swapped now and then."""
WITHOUT_REFERENCE: tuple[LossName, ...] = ("simpo", "orpo")
"""Losses that don't compare with the base model, so that their margin doesn't start at 0."""
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class Table(BaseModel):
    """A table of the recipe. Every field says what it does and in which unit."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelTable(Table):
    """Which base model is tuned."""

    source: str = "embedded"
    """`embedded` (SmolLM2-135M-Instruct from a package registry), a folder with Hugging Face weights, or a hub id."""
    revision: str = ""
    """Branch, tag or commit of a hub id; empty takes its default branch."""
    load: Literal["auto", "8bit", "4bit"] = "auto"
    """How the weights are held: `auto` is float32 on a CPU and bfloat16 on a GPU; `8bit` and `4bit` (NF4) need bitsandbytes on a GPU."""


class PairsTable(Table):
    """Which conversation pairs the model learns from."""

    source: str = "starter"
    """`starter` (512 shipped pairs), a .jsonl or .parquet file in TRL's preference format, or a hub dataset id."""
    split: str = "train"
    """Split of a hub dataset."""
    n_pairs: Annotated[int, Field(ge=0)] = 160
    """Train on at most this many pairs, chosen by the seed; 0 takes all. 160 are a few minutes on two CPU cores."""
    n_held_out: Annotated[int, Field(ge=1)] = 24
    """Pairs kept back to watch training and to fit nothing on."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """`refuse` stops at rows that are no usable pair and lists them; `drop` lists them and goes on without."""


class TrainTable(Table):
    """Preference optimization of an adapter, or of all weights."""

    tuning: Literal["lora", "full"] = "lora"
    """What is trained: an adapter, or all weights of the chosen layers (`full`), which needs about 16 bytes a weight."""
    loss: LossName = "sigmoid"
    """What is minimised, by TRL's names: `sigmoid` is DPO, `simpo` and `orpo` need no reference, the others are DPO's variants."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs thought to have swapped sides: `sigmoid` is then conservative DPO. Also for `robust`, `sigmoid_norm`, `simpo`."""
    simpo_gamma: Annotated[float, Field(ge=0)] = 0.5
    """Margin that `simpo` asks for, in units of beta times nats a token."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the tuned model is held to the base model: 0.05 lets it move further, 0.5 keeps it close.
    `ipo` calls it tau, `orpo` lambda; `sigmoid_norm` is used at about 5, `simpo` at 2."""
    nll_weight: Annotated[float, Field(ge=0)] = 5.0
    """Weight of the chosen answer's mean negative log-likelihood (nats a token), which keeps its words likely; 0 is the bare loss."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak step size of AdamW; it rises over `n_warmup_steps` and falls to 0 along a cosine."""
    n_warmup_steps: Annotated[int, Field(ge=0)] = 4
    """Optimizer steps until the peak."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps the optimizer's memory of each weight in 2 bytes instead of 8; it needs bitsandbytes on a GPU."""
    n_epochs: Annotated[int, Field(ge=1)] = 1
    """Times each pair is seen."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Pairs an optimizer step."""
    tokens_per_forward: Annotated[int, Field(ge=1)] = 448
    """Pairs share a forward up to this many different tokens: more is faster and needs more memory, a longer pair runs alone."""
    max_gradient_norm: Annotated[float, Field(gt=0)] = 1.0
    """Longer gradients are scaled down to this norm."""
    rank: Annotated[int, Field(ge=1)] = 8
    """Rank of the adapter's matrices: more can learn more and costs more."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs dropped while training."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Linear layers that get an adapter, by name; `all-linear` takes all of a decoder layer, whatever they are called."""
    first_layer_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Layers below this share of the depth stay as they are: 0 adapts all, 0.5 the upper half, which also costs less."""
    last_layer_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Layers above this share of the depth stay as they are; 1 adapts up to the last."""
    rslora: bool = False
    """Scale the adapter's output by alpha / sqrt(rank) instead, which keeps large ranks learning (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the length of each output's weights apart from their direction (DoRA, Liu et al. 2024): slower, not for llama.cpp."""
    pissa: bool = False
    """Start the adapter from the base weights' largest directions (PiSSA, Meng et al. 2024); the finished one has twice the rank."""
    max_tokens: Annotated[int, Field(ge=16)] = 1024
    """Longest prompt plus answer, in tokens; longer pairs are never cut."""
    long_pairs: Literal["refuse", "drop"] = "refuse"
    """`refuse` stops at pairs over `max_tokens` and lists them; `drop` lists them and goes on without."""
    eval_every: Annotated[int, Field(ge=1)] = 5
    """Optimizer steps between looks at the held-out pairs; each look also saves a checkpoint."""
    strength: Annotated[float, Field(gt=0, le=1)] = 0.43
    """How much of what was learnt the finished adapter applies: 1 is all; less keeps more of the base's fluency and facts."""
    stop_margin: Annotated[float, Field(gt=0)] = 5.0
    """Stop once the loss's own held-out margin gets here: past it the pairs are told apart and only damage grows. DPO's margin in nats
    times beta; for `sigmoid_norm` and `simpo` a token (less `simpo_gamma`), for `orpo` the log odds ratio; never for `ipo`, which holds
    its margin itself."""
    stop_chosen_drop: Annotated[float, Field(gt=0)] = 5.0
    """Stop once held-out chosen answers are this many nats less likely than under the base model."""
    warn_kl: Annotated[float, Field(gt=0)] = 0.5
    """Warn once the tuned model is this far from base on held-out answers (KL divergence in nats a token)."""
    trackers: Annotated[tuple[TrackerName, ...], Field(strict=False)] = ("tensorboard",)
    """Where the curves also go while training; TensorBoard reads them from `trackers/` in the run folder. Empty for nowhere."""

    @field_validator("last_layer_share")
    @classmethod
    def _refuse_no_layers(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("first_layer_share", 0):
            raise PydanticCustomError("layers", "it must be more than first_layer_share")
        return value

    @field_validator("pissa")
    @classmethod
    def _refuse_pissa_with_dora(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("dora"):
            raise PydanticCustomError("pissa", "an adapter with dora can't start from the base weights")
        return value

    @field_validator("label_smoothing")
    @classmethod
    def _refuse_where_the_loss_has_none(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("loss") in WITHOUT_LABEL_SMOOTHING:
            losses = ", ".join(WITHOUT_LABEL_SMOOTHING)
            raise PydanticCustomError("label_smoothing", f"{losses} have no label smoothing")
        return value


class RespondTable(Table):
    """How base, prompted base and tuned model answer the held-out prompts."""

    prompts: str = "starter"
    """`starter` (384 shipped prompts) or a .jsonl file with `prompt` in each row."""
    n_prompts: Annotated[int, Field(ge=0)] = 0
    """Answer only this many, chosen by the seed; 0 answers all."""
    engine: Literal["auto", "embedded", "transformers"] = "auto"
    """`embedded` is llama.cpp in process (Llama-type models), `transformers` runs any model; `auto` takes the first that can."""
    temperature: Annotated[float, Field(ge=0)] = 0.5
    """Randomness of sampling; 0 always takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Sample from the likeliest tokens that together hold this probability."""
    top_k: Annotated[int, Field(ge=1)] = 40
    """Sample from only this many of the likeliest tokens."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 112
    """Longest answer in tokens; longer ones are cut off and counted as such."""
    system_prompt: str = STYLE_PROMPT
    """What the prompted base is told; base and tuned get no system prompt of ours."""
    adapter_strength: Annotated[float, Field(ge=0, le=2)] = 1.0
    """How much of the finished adapter the tuned model uses: 0 is base, 1 the adapter as saved."""
    n_parallel: Annotated[int, Field(ge=1)] = 32
    """Answers written at the same time."""


class MeasureTable(Table):
    """What is counted in the answers."""

    n_bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples of the prompts for each interval."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of the intervals."""
    max_human_claim_rise: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Honesty gate: the share of answers that claim a human life may rise this much over base, interval included."""


class ReportTable(Table):
    """What the report shows."""

    title: str = "unstilted run"
    """Heading of the report and of the model card."""
    n_examples: Annotated[int, Field(ge=1)] = 8
    """Most changed answers shown side by side."""
    picture: str = ""
    """Id of the prompt in `before_after.svg`; empty takes the most changed one that fits."""


class Recipe(Table):
    """All settings of a run."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Everything random follows from it."""
    model: ModelTable = ModelTable()
    pairs: PairsTable = PairsTable()
    train: TrainTable = TrainTable()
    respond: RespondTable = RespondTable()
    measure: MeasureTable = MeasureTable()
    report: ReportTable = ReportTable()


SHIPPED = Path(__file__).parent / "recipes"


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.stem for file in SHIPPED.glob("*.toml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe that is given by its path or, when it is a shipped one, by name. Raises UserError for an unknown name."""
    if name in shipped_recipes() and not Path(name).is_file():
        return SHIPPED / f"{name}.toml"
    if not Path(name).is_file() and Path(name).name == name and not Path(name).suffix:
        raise UserError("there is no such recipe.", where=name, do=f"Give a TOML file, or one of {', '.join(shipped_recipes())}.")
    return Path(name)


def load_recipe(path: Path) -> Recipe:
    """Read a TOML recipe; what it leaves out keeps its default, or what the shipped recipe named by `extends` says.

    Raises UserError naming file, line and setting for TOML that doesn't parse, an unknown key (with the nearest known one)
    or a value out of range.
    """
    if not path.is_file():
        raise UserError("there is no such recipe.", where=str(path), do="`unstilted recipe` prints one to start from.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = tomllib.loads(text)
        return recipe_from(_extended(values, path) if "extends" in values else values, text, str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"this is not UTF-8 text ({error.reason}).", where=str(path), do="Save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"this is not TOML: {error}.", where=str(path), do="Mend that line.") from None


def _extended(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """A recipe's values over those of the shipped recipe that it extends."""
    name = values.pop("extends")
    if name not in shipped_recipes():
        raise UserError(f"'extends' is {name!r}.", where=str(path), do=f"Name a shipped recipe: {', '.join(shipped_recipes())}.")
    parent = load_recipe(SHIPPED / f"{name}.toml").model_dump()
    return parent | {key: parent[key] | value if isinstance(value, dict) and key in parent else value for key, value in values.items()}


def recipe_from(values: dict[str, Any], text: str = "", where: str = "recipe") -> Recipe:
    """A recipe from parsed TOML; `text` is only used to name the line in errors."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _user_error(error, text, where) from None


def recipe_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML, each setting under a comment with its meaning."""
    tables = {name: value for name, value in recipe if isinstance(value, Table)}
    top = [_setting(recipe, name) for name, _ in recipe if name not in tables]
    parts = ["\n".join(top)]
    for name, table in tables.items():
        doc = (type(table).__doc__ or "").strip()
        parts.append("\n".join([f"# {doc}", f"[{name}]", *(_setting(table, field) for field, _ in table)]))
    return "\n\n".join(parts) + "\n"


def _setting(table: Table, name: str) -> str:
    doc = " ".join((type(table).model_fields[name].description or "").split())
    return f"# {doc}\n{name} = {_toml_value(getattr(table, name))}"


def _toml_value(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case tuple():
            return "[" + ", ".join(_toml_value(item) for item in value) + "]"
        case _:
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _user_error(error: ValidationError, text: str, where: str) -> UserError:
    first = error.errors()[0]
    *tables, key = (str(part) for part in first["loc"][:2])
    place = f"{where}{_line_of(text, tables, key)}"
    setting = ".".join([*tables, key])
    if first["type"] == "model_type":
        return UserError(
            f"'{setting}' is {first['input']!r}, but it is a table.", where=place, do=f"Write [{setting}] and its settings below."
        )
    if first["type"] != "extra_forbidden":
        return UserError(f"'{setting}' is {first['input']!r}: {first['msg'].lower()}.", where=place, do="Change the value.")
    known = _known_keys(tables)
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"Known here: {', '.join(known)}."
    return UserError(f"'{setting}' is not a setting.", where=place, do=hint)


def _known_keys(tables: list[str]) -> list[str]:
    table: type[BaseModel] = Recipe
    for name in tables:
        table = type(getattr(Recipe(), name))
    return list(table.model_fields)


def _line_of(text: str, tables: list[str], key: str) -> str:
    """' line N' of a setting in TOML text, or nothing when it isn't written as `key = ...` under `[table]`."""
    current = ""
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.strip()
        if header := re.match(r"\[+\s*([^\]]*?)\s*\]", stripped):
            current = header[1]
            if not tables and current == key:
                return f" line {number}"
        elif ".".join([*([current] if current else []), stripped.split("=")[0].strip()]) == ".".join([*tables, key]):
            return f" line {number}"
    return ""
