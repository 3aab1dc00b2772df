"""A model cut to every second layer and trained briefly, to measure what kinship with its teacher is worth.

    python benchmarks/halved.py sentence-transformers/all-MiniLM-L6-v2 models/L6-half --text FILE

keeps the second of every two layers, and trains them for some hundred steps to say on plain text what the whole model
says after the same layers. Embeddings stay as they are, and so does the tokenizer.
"""

from __future__ import annotations

import torch
import transformers
from torch import nn

import brief


def main() -> None:
    """Cut, train, write."""
    parser = brief.parser(__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row at most")
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    whole, half = (_load(args.model).eval() for _ in range(2))
    layers = _layers(half)
    ends = list(range(len(layers), 0, -2))[::-1]  # of the states that are learned; the first of all is the embeddings'
    kept = nn.ModuleList([layers[end - 1] for end in ends])
    del layers[:]
    layers.extend(kept)
    half.config.num_hidden_layers = len(kept)

    text = brief.texts(args)
    optimizer = torch.optim.AdamW(kept.parameters(), lr=args.learning_rate, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    for step in range(args.steps):
        rows = [text[index] for index in torch.randint(len(text), (args.batch_size,)).tolist()]
        batch = tokenizer(rows, truncation=True, max_length=args.length, padding=True, return_tensors="pt")
        with torch.no_grad():
            wanted = whole(**batch, output_hidden_states=True).hidden_states
        said = half(**batch, output_hidden_states=True).hidden_states[1:]
        real = batch["attention_mask"].bool()
        losses = [_left(one[real], wanted[end][real]) for one, end in zip(said, ends, strict=True)]
        torch.stack(losses).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step}: {losses[-1].item():.3f} of the last layer's variance is unexplained", flush=True)
    brief.keep(half, tokenizer, args.out)


def _load(name: str) -> nn.Module:
    model: nn.Module = transformers.AutoModel.from_pretrained(name, trust_remote_code=False, dtype=torch.float32)
    return model


def _layers(model: nn.Module) -> nn.ModuleList:
    """The list of a model's layers."""
    count = model.config.num_hidden_layers
    found = [one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one) == count]
    if len(found) != 1:
        raise SystemExit(f"{type(model).__name__} has {len(found)} lists of {count} layers; expected one")
    return found[0]


def _left(said: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The share of the variance of [rows, width] that is left."""
    return (said - wanted).square().mean() / wanted.var(dim=0, unbiased=False).mean()


if __name__ == "__main__":
    main()
