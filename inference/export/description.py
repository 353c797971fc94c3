"""What an exported file says of itself, for a program that has nothing but the file."""

from inference.align import pieces
from inference.onnx.session import FORMAT
from modules.search import CTCSearch

SEARCH = ("beam_size", "beam_prune_logp", "token_prune_min_logp")


def describe(recognizer, config, graph, int8):
    """-> plain data: features, vocabulary, times, search, states.

    vocabulary : what each token writes, with SentencePiece's sign for the space before a word
    states : name, shape of one utterance, dtype; all begin as zeros
    """
    search = config["parts"]["search"]
    if search["new"] != "modules.search.CTCSearch":  # an S2S model: its CTC head, as CTC does
        search = vars(CTCSearch([]))["pruning"]
    return {
        "format": FORMAT,
        "streaming": graph.streaming,
        "int8": int8,
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
        "frames_multiple_of": graph.chunk if graph.streaming else 1,
        "frames_again": graph.lookahead,
        "subsampling": graph.frontend.subsampling,
        "states": [
            {"name": name, "shape": list(x.shape[1:]), "dtype": str(x.dtype).removeprefix("torch.")}
            for name, x in zip(graph.inputs[2:], graph.states(1), strict=True)
        ],
        "sample_rate": recognizer.sample_rate,
        "features": feature_settings(recognizer.features),
        "seconds_per_frame": recognizer.seconds_per_frame,
        "vocabulary": pieces(range(len(recognizer.tokenizer)), recognizer.tokenizer),
        "blank": 0,
        "search": {name: search[name] for name in SEARCH},
        "whole_seconds": recognizer.whole_seconds,
        "window_seconds": recognizer.window_seconds,
    }


def feature_settings(features):
    """Of log-mel features, lengths in samples."""
    stft, banks = features.fbank.compute_STFT, features.fbank.compute_fbanks
    return {
        "kind": "log-mel",
        "n_fft": features.n_fft,
        "win_length": stft.win_length,
        "hop_length": features.hop,
        "window": "hamming",
        "n_mels": banks.n_mels,
        "f_min": banks.f_min,
        "f_max": banks.f_max,
        "amin": banks.amin,
        "top_db": features.top_db,
    }
