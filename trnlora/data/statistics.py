"""Statistics of a data set's responses."""

STATISTICS_ROWS = 20_000  # how many responses are looked at: Punkt learns from all of its text at once, in memory


def response_statistics(responses: list[str]) -> dict[str, float]:
    """The mean number of sentences and of words of a response.

    Sentences are found by nltk's Punkt, which learns abbreviations from these very responses: its trained models would
    have to be downloaded. Words are nltk's wordpunct tokens that contain a letter or a digit.
    """
    from nltk.tokenize import PunktSentenceTokenizer, wordpunct_tokenize

    punkt = PunktSentenceTokenizer("\n\n".join(responses))
    sentences = sum(len(punkt.tokenize(response)) for response in responses)
    words = sum(any(map(str.isalnum, token)) for response in responses for token in wordpunct_tokenize(response))
    return {"mean_sentences": round(sentences / len(responses), 3), "mean_words": round(words / len(responses), 3)}
