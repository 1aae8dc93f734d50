"""How alike a translation and a human one are."""

import itertools
from collections.abc import Sequence


def bleu(hypotheses: Sequence[str], references: Sequence[str | Sequence[str]]) -> tuple[float, str]:
    """BLEU of all sentences together, from 0 to 100 (Papineni et al. 2002), and sacrebleu's signature, which says how it was computed (Post 2018). Each sentence has a reference, or several.

    The texts are plain ones, as a reader sees them: sacrebleu cuts them into words itself.
    """
    import sacrebleu  # Not every experiment needs it.

    metric = sacrebleu.BLEU(force=True)  # Captions that end in a stop of its own word are no mistake to warn of.
    several = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
    columns = [list(column) for column in itertools.zip_longest(*several)]  # None where a sentence has fewer references.
    score = metric.corpus_score(list(hypotheses), columns)
    return float(score.score), str(metric.get_signature())
