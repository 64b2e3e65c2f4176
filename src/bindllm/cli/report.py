"""``bindllm report`` and ``bindllm version``."""

from __future__ import annotations

from bindllm.cli.usage import Arguments


def report(args: list[str]) -> int:
    """Write the report page of a checkpoint folder again, from the files beside it."""
    parser = Arguments("report", "Write report.html again, from the metrics, captions and log in the folder.")
    parser.add_argument("folder", help="a checkpoint folder that bindllm fit wrote")
    folder = parser.parse_args(args).folder

    from bindllm.report.report import rebuild_report

    print(rebuild_report(folder))
    return 0


def version(args: list[str]) -> int:
    """Print versions, one a line."""
    Arguments("version", "Print the versions of bindllm and of what it stands on.").parse_args(args)

    from bindllm.report.report import software_versions

    for package, number in software_versions().items():
        print(f"{package} {number}")
    return 0
