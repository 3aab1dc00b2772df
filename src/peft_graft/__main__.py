"""``python -m peft_graft``."""

from peft_graft.cli import main

if __name__ == "__main__":
    main()
