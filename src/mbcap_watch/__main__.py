"""`python -m mbcap_watch` is `mbcap-watch`."""

from mbcap_watch.cli.app import main

if __name__ == "__main__":
    main()
