"""An output folder's hyperparams.yaml to a package's configuration."""

from pathlib import Path

from inference.files import NGRAM
from inference.parts import CLASSES, FORMAT, MODEL, build
from modules.errors import UserError
from modules.resolved import ResolvedYAML
from modules.tokenizer import SubwordTokenizer

PARTS = {  # the package's name of a part: the YAML file's
    "features": "compute_features",
    "normalize": "normalize",
    "frontend": "frontend",
    "encoder": "encoder",
    "ctc_head": "ctc_head",
    "decoder": "decoder",
    "seq_head": "seq_head",
    "tokenizer": "tokenizer",
}


class Resolved(ResolvedYAML):
    """A training's, with the objects that `inference.parts` reads."""

    def __init__(self, path):
        super().__init__(path, CLASSES, "inference/parts.py")

    def search(self, key, order):
        """A search, whose parts of the model are named."""
        return self.value(key, {name: PARTS[name] for name in order})

    def model_order(self):
        """The names of the parts in the order of the checkpoint's numbers."""
        known = {id(self.nodes[PARTS[name]]): name for name in MODEL if PARTS[name] in self.nodes}
        try:
            (members,) = self.nodes["model"].value
            return [known[id(node)] for node in members.value]
        except (KeyError, ValueError, TypeError, AttributeError):
            raise UserError(
                f"{self.path}: `model` is not one list of {', '.join(MODEL)}; other parts cannot "
                "be packaged"
            ) from None


def configuration(resolved, use_lm=True):
    """The package's configuration of a resolved YAML file: what transcribing needs, no more.

    use_lm: whether the test stage's language model goes along, if it has one; its weights, which
    were tuned for it or one like it, do in any case.
    UserError for whatever is not as training writes it.
    """
    try:
        return read_configuration(resolved, use_lm)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{resolved.path} is not as training wrote it: {type(error).__name__} {error}"
        ) from None


def read_configuration(resolved, use_lm):
    order = resolved.model_order()
    parts = {n: resolved.value(PARTS[n]) for n in PARTS if n not in MODEL or n in order}
    config = {"format": FORMAT, "sample_rate": resolved.value("sample_rate"), "parts": parts}
    if "decoder" in order:
        parts["search"] = resolved.search("test_search", order)
    else:
        parts["search"] = {
            "new": "modules.search.CTCSearch",
            "labels": labels(parts["tokenizer"], resolved),
            "beam_size": resolved.value("test_beam_size"),
            "beam_prune_logp": resolved.value("beam_prune_logp"),
            "token_prune_min_logp": resolved.value("token_prune_min_logp"),
        }
    if resolved.value("no_lm"):
        return config
    config["lm_weight"] = resolved.value("lm_weight")
    if "decoder" in order:
        config["lm_temperature"] = resolved.value("temperature_lm")
    elif "word_bonus" in resolved:
        parts["search"]["beta"] = resolved.value("word_bonus")
    if use_lm and "decoder" in order:
        parts["language_model"] = resolved.value("make_lm")
    elif use_lm:
        config["ngram"] = NGRAM
    return config


def labels(node, resolved):
    """The text of each token; units that were learnt are beside the checkpoints."""
    tokenizer = build(node, {})
    if isinstance(tokenizer, SubwordTokenizer):
        tokenizer.load(Path(resolved.path).parent / "save" / "tokenizer.model")
    return tokenizer.labels
