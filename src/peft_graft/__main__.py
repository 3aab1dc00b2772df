"""``python -m peft_graft``."""

from peft_graft.cli.main import main

if __name__ == "__main__":
    main()
