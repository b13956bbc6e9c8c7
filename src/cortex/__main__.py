"""`python -m cortex` is the command `cortex`. Knows nothing else."""

from cortex.cli import main

if __name__ == "__main__":
    main(prog_name="cortex")
