"""The model card of a package: README.md."""

import re
from pathlib import Path

CARD = """# {title}

A speech recogniser trained with Mamba-ASR. Everything it needs is in this folder.

## Use

DIR stands for this folder.

```python
from inference import Recognizer  # with the Mamba-ASR repository, or src/ here, on the path

recognizer = Recognizer.from_folder("DIR", device="auto")
print(recognizer.transcribe("speech.flac").text)
```

With SpeechBrain and without the repository:

```python
from speechbrain.inference.interfaces import foreign_class

model = foreign_class(source="DIR", pymodule_file="interface.py", classname="Interface")
print(model.transcribe_file("speech.flac"))
```

## Model

| | |
|---|---|
{model}

## Data

| | |
|---|---|
{data}

## Error rates

{errors}

## Licence

Code in `src/`: MIT (`LICENSE`). Weights: the terms of whoever trained them and of the data above.
"""


def model_card(run, resolved, config, model, commit):
    """README.md's text.

    run : the training's output folder; resolved : its YAML file; config : the package's
    configuration; model : the packaged weights' modules; commit : text or None.
    """
    return CARD.format(
        title=title(run),
        model=rows(model_facts(config, model, commit)),
        data=rows(data_facts(resolved)),
        errors=error_table(run),
    )


def rows(facts):
    return "\n".join(f"| {name} | {value} |" for name, value in facts.items())


def title(run):
    """The name of the YAML file that was trained, which its resolved copy begins with."""
    text = (run / "hyperparams.yaml").read_text(encoding="utf-8")
    match = re.match(r"# From (\S+)\n", text)
    path = Path(match[1]) if match else Path(run).absolute()
    return f"{path.parent.name}/{path.stem}"


def model_facts(config, model, commit):
    """What was built: {name: text}."""
    parts = config["parts"]
    encoder, search = parts["encoder"], parts["search"]
    facts = {
        "encoder": f"{encoder['num_layers']} layers of width {encoder['d_model']}, "
        f"{short(encoder['mixer']['factory'])} mixer",
    }
    if decoder := parts.get("decoder"):
        facts["decoder"] = (
            f"{decoder['num_layers']} layers of width {decoder['d_model']}, "
            f"{short(decoder['layer']['factory'])}"
        )
    weights = sum(p.numel() for p in model.parameters())
    facts["parameters"] = f"{weights / 1e6:.3f} M"
    tokens = parts["ctc_head"]["out_features"]
    facts["tokens"] = f"{tokens}, {short(parts['tokenizer']['new'])}"
    settings = {k: v for k, v in search.items() if isinstance(v, int | float) and k != "beta"}
    facts["search"] = f"{short(search['new'])}: {listed(settings)}"
    facts["language model"] = language_model_fact(config)
    facts["sampling rate"] = f"{config['sample_rate']} Hz; other rates are resampled"
    facts["code"] = f"commit {commit}" if commit else "commit unknown"
    return facts


def language_model_fact(config):
    """What the package holds, with its weights: those tuned for one that it lacks are not used."""
    parts, weight = config["parts"], {"weight": config.get("lm_weight")}
    if "ngram" in config:
        bonus = {"beta": parts["search"]["beta"]} if "beta" in parts["search"] else {}
        return f"word n-gram: {listed(weight | bonus)}"
    if node := parts.get("language_model"):
        return f"{short(node['factory'])}: {listed(weight)}"
    return "none"


def listed(settings):
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def short(name):
    return name.rpartition(".")[2]


def data_facts(resolved):
    """Which splits the run used: {name: text}."""
    facts = {"folder": Path(str(resolved.value("data_folder"))).name}
    for name in ("train", "dev", "test"):
        facts[name] = ", ".join(map(str, resolved.value(f"{name}_splits")))
    return facts


def error_table(run):
    """The word error rates of `wer_*.txt`, as the training script's last evaluation left them."""
    lines = []
    for path in sorted(run.glob("wer_*.txt")):
        head = path.read_text(encoding="utf-8").partition("\n")[0]
        if match := re.match(r"%WER (\S+) \[ (\d+) / (\d+),", head):
            name = path.stem.removeprefix("wer_")
            lines.append(f"| {name} | {match[1]} | {match[2]} of {match[3]} |")
    if not lines:
        return "Not measured: the training's folder holds no `wer_<test set>.txt`."
    table = ["| test set | WER % | word errors |", "|---|---|---|", *lines]
    return "\n".join([*table, "", "By the last evaluation in the training's output folder."])
