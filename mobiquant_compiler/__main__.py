"""``python -m mobiquant_compiler`` is `mobiquant`."""

from mobiquant_compiler.cli import main

if __name__ == "__main__":
    main()
