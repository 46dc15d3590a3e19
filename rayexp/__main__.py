"""`python -m rayexp`"""

from rayexp.cli import main

if __name__ == "__main__":
    main()
