"""A continued pre-training of a language model, to measure what grafts are worth between relatives.

    python benchmarks/continued.py HuggingFaceTB/SmolLM2-135M-Instruct data/smollm2-continued --text FILE

trains all weights on plain text for a few hundred steps. The tokenizer stays.
"""

from __future__ import annotations

import torch
import transformers

import brief


def main() -> None:
    """Read the text, train, write."""
    parser = brief.parser(__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, trust_remote_code=False, dtype=torch.float32
    ).to(args.device)
    ids = torch.tensor(tokenizer("\n".join(brief.texts(args)), add_special_tokens=False)["input_ids"])
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
    brief.keep(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
