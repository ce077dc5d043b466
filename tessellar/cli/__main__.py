"""`python -m tessellar.cli COMMAND ...`: the same as `tessellar COMMAND ...`, for processes that we
start ourselves.
"""

from tessellar.cli.main import main

if __name__ == "__main__":
    main()
