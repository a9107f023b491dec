"""``python -m mixdq_ao``: the mixdq-ao command."""

from mixdq_ao.cli import main

if __name__ == "__main__":
    main()
