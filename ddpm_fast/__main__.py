"""`python -m ddpm_fast` is `ddpm-fast`."""

from ddpm_fast.cli.main import main

if __name__ == "__main__":
    main()
