"""How alike a translation and a human one are."""

from collections.abc import Sequence


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """BLEU of all sentences together, from 0 to 100 (Papineni et al. 2002), and sacrebleu's signature, which says how it was computed (Post 2018).

    The texts are plain ones, as a reader sees them: sacrebleu cuts them into words itself.
    """
    import sacrebleu  # Not every experiment needs it.

    metric = sacrebleu.BLEU()
    score = metric.corpus_score(list(hypotheses), [list(references)])
    return float(score.score), str(metric.get_signature())
