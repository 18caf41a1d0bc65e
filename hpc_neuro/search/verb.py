"""`search`: what a study will try (--dry-run), and what came out so far. `python -m launch sweep` runs the trials."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hpc_neuro.core import files, run_folder, schema, yaml_text
from hpc_neuro.core.constants import EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.search import comparison, report_page, trial
from hpc_neuro.search.config import MAY_CHANGE, SearchConfig
from hpc_neuro.search.space import SEED, list_grid_points, list_values
from hpc_neuro.search.study import JOURNAL_FILE, compute_importances
from hpc_neuro.search.trial import Trial

log = logging.getLogger(__name__)


def forecast(cfg: SearchConfig) -> list[str]:
    """What will be tried, in lines. Raises ConfigError."""
    lines = []

    for name, dimension in cfg.space.items():
        values = list_values(dimension)
        text = files.format_count(len(values), "value") if values is not None else "a range"
        lines.append(f"{name}: {text}" + (f", where {dimension.when}" if dimension.when else ""))

    # A grid may be cut short by `trials`.
    is_grid = cfg.sampler.kind == "grid"
    count = min(len(list_grid_points(cfg.space)), cfg.trials or 10**9) if is_grid else cfg.trials
    stopping = f"early stopping from step {cfg.asha.first}" if cfg.asha else "no early stopping"
    trials = files.format_count(int(count or 0), "trial")
    lines.append(
        f"{trials} of {' + '.join(cfg.recipe)} by {cfg.sampler.kind}, {cfg.concurrent} at a time, {stopping}; "
        f"{cfg.objective.goal} {cfg.objective.key}"
    )
    return lines


def run(cfg: SearchConfig) -> int:
    """Write report.html, trials.csv, best.yaml and, where neurons were scored, comparison.csv. 3: some failed."""
    trials = trial.load_trials(cfg.out)
    if not trials:
        raise InputError(
            f"{cfg.out} holds no trials yet; start them with `python -m launch sweep CONFIG --on local`, or on slurm"
        )

    # Values under another heading would mislead.
    _require_same_study(cfg)

    # The seed is no choice, so its importance means nothing.
    names = [name for name in cfg.space if name != SEED]
    importances = compute_importances(cfg.out, names) if (cfg.out / JOURNAL_FILE).exists() else {}
    settings = comparison.read_comparison(cfg, trials) if "evaluate" in cfg.recipe else None
    best = find_best_trial(cfg, trials)

    if best is not None:
        _write_best_config(cfg, best)

    if settings is not None:
        files.write_text(cfg.out / "comparison.csv", comparison.format_csv(settings))

    files.write_text(cfg.out / "trials.csv", report_page.format_trials_csv(cfg, trials))
    page = report_page.build_page(cfg, trials, best, importances, settings, run_folder.code_version())
    files.write_text(cfg.out / "report.html", page)

    counts = ", ".join(f"{sum(t.state == state for t in trials)} {state}" for state in trial.ENDED_STATES)
    total = files.format_count(len(trials), "trial")
    log.info("search: %s: %s; report: %s", total, counts, cfg.out / "report.html")
    if best is not None:
        log.info("search: best is trial %d, %s %.4g: %s", best.number, cfg.objective.key, best.value, best.values)

    return EXIT_FAILURES if any(t.state == "failed" for t in trials) else EXIT_DONE


def find_best_trial(cfg: SearchConfig, trials: Sequence[Trial]) -> Trial | None:
    """The finished trial of the best value, the first of equals; None when none has finished."""
    done = [t for t in trials if t.state == "done" and t.value is not None]
    # The lowest number of equals: the first one found.
    sign = -1 if cfg.objective.goal == "maximize" else 1
    return min(done, key=lambda t: (sign * float(t.value or 0.0), t.number), default=None)


def _require_same_study(cfg: SearchConfig) -> None:
    """Raise ConfigError where the trials were made for another space or judged by another objective."""
    # The folder may have been moved, and some keys may differ.
    record = run_folder.read_record(cfg.out, "start the sweep again with `python -m launch sweep`")["config"]
    config = {key: value for key, value in schema.to_plain(cfg).items() if key != "out"}
    if differences := run_folder.differences(config, record, MAY_CHANGE):
        raise ConfigError(
            f"the trials in {cfg.out} are of another config; give theirs. Different:\n  " + "\n  ".join(differences)
        )


def _write_best_config(cfg: SearchConfig, best: Trial) -> None:
    """Write the train config of the best trial, which trains as it is into a folder of its own."""
    # Its own folder belongs to the study.
    tree = schema.read_yaml(best.folder / "train.yaml")
    tree["out"] = str(cfg.out.absolute() / "best")
    text = f"# Trial {best.number} of {cfg.out}: {cfg.objective.key} {best.value!r}\n"
    text += "# hpc-neuro train best.yaml\n" + yaml_text.dump(tree)
    files.write_text(cfg.out / "best.yaml", text)
