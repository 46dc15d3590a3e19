"""A language model's checkpoint for its report: perplexity on the test text, and a text that it writes."""

from __future__ import annotations

from rayexp.errors import RunError, UserError
from rayexp.launch.evaluate import evaluate
from rayexp.pages.language import LanguageSample
from rayexp.runs.run import Run

WORDS = 100


def language_sample(run: Run, epoch: int) -> LanguageSample:
    """Evaluate the checkpoint of an epoch, and let it write; what the run directory or the data does not allow is
    left out with the reason."""
    test, why_no_test, text, why_no_text = None, "", "", ""
    try:
        metrics = evaluate(run, epoch).metrics
        test = {name: metrics[name] for name in ("test_loss", "test_ppl") if name in metrics} or None
        why_no_test = "" if test else f"{run.config().workload} has no test data"
    except (UserError, RunError) as error:
        why_no_test = str(error)
    try:
        text = _write(run, epoch)
    except (UserError, RunError) as error:
        why_no_text = str(error)
    return LanguageSample(epoch, test, why_no_test, text, why_no_text, WORDS)


def _write(run: Run, epoch: int) -> str:
    from rayexp.data.text import EOS
    from rayexp.engine import settings
    from rayexp.workloads.language_model import generate

    with settings.threads(1):
        writer = generate.open_generator(run, epoch)
        numbers = list(generate.generate(writer.net, [writer.vocabulary.index(EOS)], WORDS))
    return generate.lines([writer.vocabulary[n] for n in numbers])
