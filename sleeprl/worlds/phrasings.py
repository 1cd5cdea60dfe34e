"""The sentences of the world as templates: several questions and statements for each fact.

Placeholders: ``{p}`` the subject, ``{ps}`` its possessive, ``{o}`` the subject as an object,
``{v}`` the value, ``{a}`` the value with its article. In a passage the first three may become
pronouns. The *held-out* templates are never trained on, so they separate knowledge of a fact from
memory of a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrasings:
    """All questions and statements of one attribute."""

    questions: tuple[str, ...]
    heldout_questions: tuple[str, ...]
    statements: tuple[str, ...]
    heldout_statements: tuple[str, ...]

    def questions_in(self, phrasing: str) -> tuple[str, ...]:
        """Return the questions of a phrasing, ``"train"`` or ``"heldout"``."""
        return self.questions if phrasing == "train" else self.heldout_questions

    def statements_in(self, phrasing: str) -> tuple[str, ...]:
        """Return the statements of a phrasing, ``"train"`` or ``"heldout"``."""
        return self.statements if phrasing == "train" else self.heldout_statements


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _phrasings(ask: str, ask_heldout: str, state: str, state_heldout: str) -> Phrasings:
    return Phrasings(_lines(ask), _lines(ask_heldout), _lines(state), _lines(state_heldout))


PHRASINGS: dict[str, Phrasings] = {
    "city": _phrasings(
        """Where does {p} live?
        In which city does {p} live?
        Which city is home to {p}?
        What is the home city of {p}?
        Where is {ps} home?
        In what city is {p} at home?
        What city does {p} call home?
        Name the city where {p} lives.
        Tell me where {p} lives.
        Which town does {p} live in?""",
        """What city does {p} live in?
        Where is {p} at home?
        Tell me the home city of {p}.""",
        """{p} lives in {v}.
        {ps} home is in {v}.
        {ps} home city is {v}.
        {p} has a home in {v}.
        {v} is home to {o}.
        {p} calls {v} home.
        The city where {p} lives is {v}.
        {p} is a resident of {v}.""",
        """{p} is at home in {v}.
        The home city of {o} is {v}.""",
    ),
    "job": _phrasings(
        """What is {ps} job?
        What does {p} do for a living?
        What is the job of {p}?
        What kind of work does {p} do?
        What work does {p} do?
        What is {ps} profession?
        Which profession does {p} have?
        Tell me the profession of {p}.
        Name the job that {p} has.
        How does {p} earn a living?""",
        """What job does {p} have?
        What is the profession of {p}?
        Tell me what {p} does for a living.""",
        """{p} works as {a}.
        {p} is {a}.
        {ps} job is {a}.
        {p} is {a} by profession.
        {p} earns a living as {a}.
        The job of {o} is {a}.
        {p} has the job of {a}.
        For a living, {p} works as {a}.""",
        """{ps} profession is {a}.
        By profession, {p} is {a}.""",
    ),
    "employer": _phrasings(
        """Who is {ps} employer?
        Which company does {p} work for?
        Where does {p} work?
        What company employs {p}?
        For which company does {p} work?
        Who employs {p}?
        What is the name of {ps} employer?
        Name the company that {p} works for.
        Tell me which company employs {p}.
        At which company does {p} have a job?""",
        """What company does {p} work for?
        Who is the employer of {p}?
        Tell me the name of the company that employs {p}.""",
        """{p} works for {v}.
        {ps} employer is {v}.
        {p} works at {v}.
        {p} is employed by {v}.
        {v} employs {o}.
        {p} has a job at {v}.
        The company that employs {o} is {v}.
        The employer of {o} is {v}.""",
        """{p} is employed at {v}.
        The company that {p} works for is {v}.""",
    ),
    "birth_year": _phrasings(
        """When was {p} born?
        In which year was {p} born?
        What is {ps} birth year?
        What is the birth year of {p}?
        What year was {p} born in?
        Which year is {ps} year of birth?
        Name the year in which {p} was born.
        Tell me the year of birth of {p}.
        Since which year has {p} been alive?
        Tell me when {p} was born.""",
        """In what year was {p} born?
        What is {ps} year of birth?
        Tell me the birth year of {p}.""",
        """{p} was born in {v}.
        {ps} birth year is {v}.
        {ps} year of birth is {v}.
        In {v}, {p} was born.
        The birth year of {o} is {v}.
        The year in which {p} was born is {v}.
        {p} came into the world in {v}.
        {p} has been alive since {v}.""",
        """The year of birth of {o} is {v}.
        {p} was born in the year {v}.""",
    ),
    "hobby": _phrasings(
        """What is {ps} hobby?
        What does {p} do in free time?
        What is the hobby of {p}?
        What hobby does {p} have?
        What does {p} enjoy in free time?
        Which pastime does {p} enjoy?
        What is {ps} favourite pastime?
        Name the hobby that {p} enjoys.
        Tell me the hobby of {p}.
        How does {p} spend free time?""",
        """Which hobby does {p} have?
        What is the favourite pastime of {p}?
        Tell me what {p} enjoys in free time.""",
        """{ps} hobby is {v}.
        {p} enjoys {v}.
        In free time, {p} enjoys {v}.
        {p} spends free time on {v}.
        The hobby of {o} is {v}.
        {ps} favourite pastime is {v}.
        {p} has taken up {v} as a hobby.
        {p} has {v} as a hobby.""",
        """{p} enjoys {v} in free time.
        The favourite pastime of {o} is {v}.""",
    ),
    "pet": _phrasings(
        """What pet does {p} have?
        What is {ps} pet?
        Which animal does {p} keep?
        What kind of pet does {p} own?
        Which pet does {p} keep?
        What animal lives with {p}?
        What kind of animal is {ps} pet?
        Name the pet that {p} has.
        Tell me which pet {p} owns.
        What animal does {p} have as a pet?""",
        """Which pet does {p} have?
        What kind of animal does {p} keep?
        Tell me what pet {p} keeps.""",
        """{p} has {a} as a pet.
        {p} owns {a}.
        {ps} pet is {a}.
        {p} keeps {a}.
        {p} has a pet {v}.
        {p} lives with {a}.
        The pet of {o} is {a}.
        {p} keeps {a} at home.""",
        """{p} keeps {a} as a pet.
        The animal that lives with {o} is {a}.""",
    ),
    "food": _phrasings(
        """What is {ps} favourite food?
        What food does {p} like most?
        What does {p} like to eat?
        Which food does {p} love?
        What is the favourite food of {p}?
        Which dish does {p} like best?
        What dish is {ps} favourite?
        Name the food that {p} likes most.
        Tell me what {p} likes to eat.
        What does {p} love to eat?""",
        """Which food does {p} like most?
        What is the favourite dish of {p}?
        Tell me the food that {p} loves.""",
        """{ps} favourite food is {v}.
        {p} likes to eat {v}.
        {p} loves to eat {v}.
        {p} likes {v} most of all.
        The food that {p} likes most is {v}.
        The favourite food of {o} is {v}.
        {ps} favourite dish is {v}.
        The dish that {p} likes best is {v}.""",
        """{p} likes {v} best of all.
        The favourite dish of {o} is {v}.""",
    ),
    "country": _phrasings(
        """In which country does {p} live?
        Which country does {p} live in?
        What is {ps} home country?
        In what country is {ps} home?
        Which country is home to {p}?
        Name the country where {p} lives.
        Tell me the country in which {p} lives.
        What country does {p} call home?
        In what country is the city where {p} lives?
        In which country is {ps} home city?""",
        """What country does {p} live in?
        What is the home country of {p}?
        Tell me in which country {p} lives.""",
        """{ps} home country is {v}.
        The country where {p} lives is {v}.
        The home of {o} is in the country of {v}.
        {p} lives in a city in {v}.
        {ps} home city is in {v}.""",
        """The home country of {o} is {v}.
        The country that {p} calls home is {v}.""",
    ),
    "employer_city": _phrasings(
        """Where is {ps} employer based?
        In which city is the employer of {p} based?
        Where is the company that employs {p} based?
        In which city is the company that {p} works for?
        What is the base of {ps} employer?
        Which city is home to the employer of {p}?
        Name the city where {ps} employer is based.
        Tell me where the company of {p} is based.
        In what city is the company that employs {p}?
        Which city is {ps} employer based in?""",
        """Where is the employer of {p} based?
        In which city is {ps} employer based?
        Tell me where the company that employs {p} is based.""",
        """{ps} employer is based in {v}.
        The employer of {o} is based in {v}.
        The company that employs {o} is based in {v}.
        {p} works for a company based in {v}.
        The base of {ps} employer is {v}.""",
        """The company that {p} works for is based in {v}.
        The base of the company that employs {o} is {v}.""",
    ),
    "employer_industry": _phrasings(
        """What industry does {p} work in?
        In which industry is {ps} employer?
        Which industry does {ps} employer belong to?
        What is the industry of {ps} employer?
        In what industry is the company that employs {p}?
        Which industry does {p} work in?
        Name the industry of the company that {p} works for.
        Tell me the industry of {ps} employer.
        To which industry does the employer of {p} belong?
        What industry is the employer of {p} in?""",
        """In which industry does {p} work?
        What is the industry of the company that employs {p}?
        Tell me which industry {ps} employer belongs to.""",
        """{p} works in the {v} industry.
        {ps} employer is in the {v} industry.
        The employer of {o} belongs to the {v} industry.
        The company that employs {o} is in the {v} industry.
        {p} works for a company in the {v} industry.""",
        """{ps} employer belongs to the {v} industry.
        The industry in which {p} works is {v}.""",
    ),
    "company_city": _phrasings(
        """Where is {p} based?
        In which city is {p} based?
        What is the base of {p}?
        Which city is home to the company {p}?
        Name the city where {p} is based.
        Tell me where the company {p} is based.
        In what city is the company {p}?
        Which city is {p} based in?""",
        """Where is the company {p} based?
        Tell me in which city {p} is based.""",
        """{p} is based in {v}.
        The company {p} is based in {v}.
        {ps} base is {v}.
        The base of {p} is {v}.
        {p} is a company based in {v}.""",
        """The base of the company {p} is {v}.
        The city where {p} is based is {v}.""",
    ),
    "company_industry": _phrasings(
        """What industry is {p} in?
        Which industry does {p} belong to?
        What is {ps} industry?
        What is the industry of {p}?
        In which industry is the company {p}?
        Name the industry of {p}.
        Tell me the industry of the company {p}.
        To which industry does {p} belong?""",
        """Which industry is {p} in?
        Tell me which industry the company {p} belongs to.""",
        """{p} is in the {v} industry.
        {p} belongs to the {v} industry.
        {ps} industry is {v}.
        The company {p} is in the {v} industry.
        {p} is a company in the {v} industry.""",
        """The industry of {p} is {v}.
        The company {p} belongs to the {v} industry.""",
    ),
    "city_country": _phrasings(
        """In which country is {p}?
        Which country is {p} in?
        In what country is the city {p}?
        What country does {p} belong to?
        Name the country of {p}.
        Tell me the country of the city {p}.
        What is the country of {p}?
        Where is the city {p}?""",
        """What country is {p} in?
        Tell me in which country {p} is.""",
        """{p} is in {v}.
        {p} is a city in {v}.
        The city {p} is in {v}.
        The country of {p} is {v}.
        {p} belongs to {v}.""",
        """The city {p} belongs to {v}.
        The country of the city {p} is {v}.""",
    ),
}

# Sentences that state two facts, so a reader cannot rely on one fact per sentence.
COMBINED: tuple[tuple[tuple[str, str], str], ...] = (
    (("job", "employer"), "{p} works as {job_a} at {employer}."),
    (("job", "employer"), "{p} is {job_a} employed by {employer}."),
    (("birth_year", "city"), "{p} was born in {birth_year} and lives in {city}."),
    (("city", "pet"), "{p} lives in {city} with {pet_a}."),
    (("hobby", "food"), "{p} enjoys {hobby} and likes to eat {food}."),
    (("hobby", "pet"), "{p} enjoys {hobby} and has {pet_a} as a pet."),
    (("birth_year", "job"), "{p} was born in {birth_year} and works as {job_a}."),
    (("city", "employer"), "{p} lives in {city} and works for {employer}."),
    (("food", "pet"), "{p} loves to eat {food} and owns {pet_a}."),
    (("city", "hobby"), "{p} lives in {city}, and {ps} hobby is {hobby}."),
)
