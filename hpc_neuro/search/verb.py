"""`search`: what a study will try (--dry-run), and what came out so far. `python -m launch sweep` runs the trials."""

from __future__ import annotations

import logging

import yaml

from hpc_neuro.core import files, run_folder, schema
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.search import comparison, report_page, trial
from hpc_neuro.search.config import MAY_CHANGE, SearchConfig
from hpc_neuro.search.space import SEED, grid, options
from hpc_neuro.search.study import JOURNAL, importances
from hpc_neuro.search.trial import Trial

log = logging.getLogger(__name__)


def forecast(cfg: SearchConfig) -> list[str]:
    """What will be tried, in lines. Raises ConfigError."""
    lines = []
    for name, dimension in cfg.space.items():
        values = options(dimension)
        text = f"{len(values)} values" if values is not None else "a range"
        lines.append(f"{name}: {text}" + (f", where {dimension.when}" if dimension.when else ""))
    count = min(len(grid(cfg.space)), cfg.trials or 10**9) if cfg.sampler.kind == "grid" else cfg.trials
    how = f"early stopping from step {cfg.asha.first}" if cfg.asha else "no early stopping"
    lines.append(
        f"{count} trials of {' + '.join(cfg.recipe)} by {cfg.sampler.kind}, {cfg.concurrent} at a time, {how}; "
        f"{cfg.objective.goal} {cfg.objective.key}"
    )
    return lines


def run(cfg: SearchConfig) -> int:
    """Write report.html, trials.csv, best.yaml and, where neurons were scored, comparison.csv. 3: some failed."""
    trials = trial.load_all(cfg.out)
    if not trials:
        raise InputError(
            f"{cfg.out} holds no trials yet; start them with `python -m launch sweep CONFIG --on local|slurm`"
        )
    _check_same(cfg)
    names = [n for n in cfg.space if n != SEED]
    weights = importances(cfg.out, names) if (cfg.out / JOURNAL).exists() else {}
    found = comparison.read(cfg, trials) if "evaluate" in cfg.recipe else None
    winner = best(cfg, trials)
    if winner is not None:
        _write_best(cfg, winner)
    if found is not None:
        files.write_text(cfg.out / "comparison.csv", comparison.as_csv(found))
    files.write_text(cfg.out / "trials.csv", report_page.as_csv(cfg, trials))
    files.write_text(
        cfg.out / "report.html", report_page.build(cfg, trials, winner, weights, found, run_folder.code_version())
    )
    counts = ", ".join(f"{sum(t.state == s for t in trials)} {s}" for s in trial.FINAL)
    log.info("search: %d trials: %s; report: %s", len(trials), counts, cfg.out / "report.html")
    if winner is not None:
        log.info("search: best is trial %d, %s %.4g: %s", winner.number, cfg.objective.key, winner.value, winner.values)
    return 3 if any(t.state == "failed" for t in trials) else 0


def _check_same(cfg: SearchConfig) -> None:
    """Raises ConfigError where the trials were made for another space or judged by another objective."""
    ran = files.read_json(cfg.out / "run.json", "start the sweep again with `python -m launch sweep`")["config"]
    asked = {key: value for key, value in schema.to_plain(cfg).items() if key != "out"}
    if other := run_folder.differences(asked, ran, MAY_CHANGE):
        raise ConfigError(
            f"the trials in {cfg.out} are of another config; give theirs. Different:\n  " + "\n  ".join(other)
        )


def best(cfg: SearchConfig, trials: list[Trial]) -> Trial | None:
    """The finished trial of the best value, the first of equals; None when none has finished."""
    done = [t for t in trials if t.state == "done" and t.value is not None]
    sign = -1 if cfg.objective.goal == "maximize" else 1
    return min(done, key=lambda t: (sign * float(t.value or 0.0), t.number), default=None)


def _write_best(cfg: SearchConfig, winner: Trial) -> None:
    """The winner's train config, which trains as it is into a folder of its own."""
    tree = yaml.safe_load((winner.folder / "train.yaml").read_text(encoding="utf-8"))
    tree["out"] = str(cfg.out.absolute() / "best")
    text = f"# Trial {winner.number} of {cfg.out}: {cfg.objective.key} {winner.value!r}\n"
    text += "# hpc-neuro train best.yaml\n" + yaml.safe_dump(tree, sort_keys=False, width=120)
    files.write_text(cfg.out / "best.yaml", text)
