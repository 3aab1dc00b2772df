"""A continued pre-training of a language model, to measure what grafts are worth between relatives.

    python benchmarks/continued.py HuggingFaceTB/SmolLM2-135M-Instruct data/smollm2-continued --text FILE

trains all weights on plain text for a few hundred steps. The tokenizer stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

from peft_graft.alignment.text import load_rows
from peft_graft.outputs import written_aside


def main() -> None:
    """Read the text, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", required=True, help="a file with a column of text, or of lists of words")
    parser.add_argument("--column", default="tokens")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, trust_remote_code=False, dtype=torch.float32
    ).to(args.device)
    values = (row[args.column] for row in load_rows(args.text))
    text = "\n".join(value if isinstance(value, str) else " ".join(value) for value in values)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // args.length * args.length].view(-1, args.length)
    print(f"{len(rows)} rows of {args.length} tokens, {args.steps * args.batch_size / len(rows):.1f} passes")

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    model.train()
    for step in range(args.steps):
        batch = rows[torch.randint(len(rows), (args.batch_size,))].to(args.device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step}: {loss.item():.3f} nats a token", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(args.out, force=True) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


if __name__ == "__main__":
    main()
