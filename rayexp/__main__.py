"""`python -m rayexp`"""

import sys

try:
    from rayexp.cli import main
except ModuleNotFoundError as error:
    # A job on a cluster runs in whatever `python` is there, which may be another environment than the one of `ray`.
    if (error.name or "rayexp").startswith("rayexp"):
        raise
    sys.exit(
        f"error: {sys.executable} has no {error.name}, which rayexp needs: install rayexp's dependencies there, or "
        "name another Python, for a job by `rayexp submit --python PATH`"
    )

if __name__ == "__main__":
    main()
