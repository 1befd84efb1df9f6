"""Sessions: `nox -s tests`, `nox -s lint`, `nox -s sweep`."""

import nox

nox.options.sessions = ["lint", "tests"]
CONSTRAINTS = ("-c", "constraints.txt")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after -- go to pytest."""
    session.install(*CONSTRAINTS, "-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(*CONSTRAINTS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def sweep(session: nox.Session) -> None:
    """Run a sweep on this machine; arguments after -- go to `mdnbench sweep`."""
    session.install(*CONSTRAINTS, "-e", ".")
    session.run("mdnbench", "sweep", *session.posargs)
