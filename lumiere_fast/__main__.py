"""``python -m lumiere_fast`` is the command ``lumiere-fast``."""

if __name__ == "__main__":
    from lumiere_fast.cli import main  # needs typer, which is asked of nobody who only imports

    main()
