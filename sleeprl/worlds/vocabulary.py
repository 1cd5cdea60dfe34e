"""The words of the world: names of people, and the values of their attributes.

No value is a word of another list, and no value contains another one. So the value alone suffices
to grade an answer and to parse a sentence (``tests/unit/worlds/test_worlds.py`` checks it).
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WOMEN = _words("""
    Alice Amara Anna Astrid Beatrice Bianca Camille Carla Celine Chiara Clara Daniela Daphne
    Diana Elena Elise Emma Esther Eva Farah Fatima Fiona Freya Gloria Greta Hana Hannah Helen
    Hilda Ida Ines Ingrid Irene Isabel Jana Jasmine Joanna Judith Julia Karin Katya Lara Laura
    Leila Lena Linda Louisa Lucy Maria Marina Martha Maya Mei Mina Mira Monica Nadia Naomi Nina
    Nora Olga Olivia Paula Petra Priya Rachel Renata Rosa Ruth Sara Sofia Stella Tara Teresa Vera
""")
MEN = _words("""
    Aaron Adam Ahmed Albert Anders Andrew Anton Arthur Bashir Boris Bruno Carlos Cedric Chen
    Cyrus Daniel David Dmitri Edgar Edwin Emil Enzo Eric Felix Finn Frank Gabriel George Gustav
    Hans Harold Hassan Henrik Hugo Ivan Jakob James Javier Jonas Joseph Julian Kai Karim Kenji
    Kofi Lars Leon Lorenzo Louis Luca Magnus Marco Marcus Martin Mateo Max Miguel Nathan Nikolai
    Noah Omar Oscar Otto Pablo Patrick Paul Pedro Peter Rafael Ravi Robert Samuel Simon Stefan
    Victor
""")
SURNAMES = _words("""
    Abbott Adler Aguilar Alvarez Andersen Archer Arnold Bahr Banerjee Barnes Barros Bauer Becker
    Bell Berger Bianchi Blake Bloom Bosch Boyd Braun Brooks Bryant Burke Byrne Campos Cano Carter
    Castro Chang Chapman Cho Clarke Cole Conti Cooper Costa Crane Cruz Curtis Dahl Dalton Das
    Delgado Diaz Dixon Doyle Drake Duarte Dubois Duran Eklund Ellis Engel Evans Falk Farrell
    Ferrari Fischer Fleming Flores Fontaine Foster Fox Fuchs Fuentes Gallo Garcia Garner Gibson
    Gomez Grant Greco Gruber Gupta Haas Hahn Hale Hansen Harper Hayes Heller Henry Herrera Hoffman
    Holm Horn Howard Hughes Hunt Ibrahim Iyer Jansen Jensen Joshi Kaplan Kaur Keller Kelly Kim
    Klein Knight Koch Kovacs Kowalski Kramer Kumar Lambert Lang Larsen Laurent Lindgren Lopez
    Lund Maier Maldonado Marino Marsh Mehta Mendes Mercier Meyer Molina Moore Moreau Moretti
    Morgan Muller Murphy Nash Navarro Nelson Nguyen Nilsson Nolan Novak Nunez Okafor Olsen Ortega
    Osman Owens Pace Palmer Park Patel Pereira Petrov Popov Porter Prieto Quinn Ramos Reed Reyes
    Ricci Rivera Rojas Romano Rossi Roth Rousseau Ryan Saito Salazar Santos Sato Schmidt Schultz
    Serrano Sharma Silva Singh Sousa Stein Stone Strand Suzuki Tanaka Torres Vargas Vogel Wagner
    Walsh Weber West Winter Wolff Wong Yamada Young Zimmer
""")

CITY_COUNTRY = {
    "Lisbon": "Portugal", "Porto": "Portugal", "Madrid": "Spain", "Seville": "Spain",
    "Paris": "France", "Lyon": "France", "Rome": "Italy", "Milan": "Italy",
    "Berlin": "Germany", "Hamburg": "Germany", "Oslo": "Norway", "Bergen": "Norway",
    "Stockholm": "Sweden", "Uppsala": "Sweden", "Tokyo": "Japan", "Osaka": "Japan",
    "Toronto": "Canada", "Montreal": "Canada", "Recife": "Brazil", "Salvador": "Brazil",
    "Nairobi": "Kenya", "Mombasa": "Kenya", "Cairo": "Egypt", "Alexandria": "Egypt",
    "Mumbai": "India", "Chennai": "India", "Sydney": "Australia", "Perth": "Australia",
    "Warsaw": "Poland", "Krakow": "Poland", "Athens": "Greece", "Patras": "Greece",
    "Ankara": "Turkey", "Izmir": "Turkey", "Puebla": "Mexico", "Merida": "Mexico",
    "Santiago": "Chile", "Valdivia": "Chile", "Dublin": "Ireland", "Cork": "Ireland",
    "Helsinki": "Finland", "Turku": "Finland", "Vienna": "Austria", "Graz": "Austria",
    "Budapest": "Hungary", "Szeged": "Hungary", "Lima": "Peru", "Cusco": "Peru",
    "Rabat": "Morocco", "Fez": "Morocco", "Hanoi": "Vietnam", "Hue": "Vietnam",
    "Accra": "Ghana", "Kumasi": "Ghana", "Copenhagen": "Denmark", "Aarhus": "Denmark",
    "Glasgow": "Scotland", "Dundee": "Scotland", "Zagreb": "Croatia", "Zadar": "Croatia",
}  # fmt: skip
CITIES = tuple(CITY_COUNTRY)
COUNTRIES = tuple(dict.fromkeys(CITY_COUNTRY.values()))
COMPANIES = _words("""
    Acoria Altamar Aquilon Bellwave Borealis Brightwell Calder Cinderix Cobaltic Coralis Dantex
    Deltora Dynamo Elmwood Everline Fairmont Ferrox Fluxion Glenmore Granitec Halcyon Harbor
    Helix Hexagon Ironclad Jupitron Kestrel Lumina Maplex Meridian Monarch Nebulon Northgate
    Novatek Orbitas Pallas Pinnacle Polaris Quantrel Redwood Sableton Solara Stratus Tandem
    Umbra Vantage Vertigo Zephyr
""")
INDUSTRIES = _words("""
    shipping banking robotics insurance publishing mining aviation furniture textile film toy
    software tourism steel railway energy
""")
JOBS = _words("""
    accountant architect astronomer baker biologist blacksmith bricklayer butcher carpenter chef
    chemist courier dentist designer detective driver economist editor electrician engineer
    farmer firefighter florist gardener geologist journalist judge lawyer librarian locksmith
    mechanic midwife nurse optician painter pharmacist photographer pilot plumber programmer
    receptionist sculptor secretary statistician surgeon tailor teacher translator violinist
    waiter welder zoologist
""")
HOBBIES = _words("""
    archery astronomy badminton baking beekeeping birdwatching bowling calligraphy chess climbing
    cycling dancing embroidery fencing fishing gardening hiking juggling karate kayaking knitting
    origami painting photography poetry pottery puppetry rowing running sailing singing skating
    skiing sudoku surfing swimming tennis weaving woodcarving yoga
""")
PETS = _words("""
    beagle budgie canary cat chinchilla cockatoo collie crab dachshund donkey duck ferret frog
    gecko gerbil goat goldfish goose greyhound hamster hedgehog iguana labrador lizard mouse
    parrot pigeon pony poodle rabbit rat snake spaniel spider terrier tortoise
""")
FOODS = _words("""
    biryani borscht burritos ceviche cheesecake chowder couscous curry dumplings empanadas falafel
    fondue gelato gnocchi goulash hummus kimchi lasagna meatballs moussaka noodles omelettes paella
    pancakes pho pierogi pizza porridge ramen ratatouille ravioli risotto salad spaghetti strudel
    sushi tacos tempura tiramisu waffles
""")
BIRTH_YEARS = tuple(str(year) for year in range(1940, 2004))

# What a passage states about a person, and what follows from it through a shared entity.
STATED = ("city", "job", "employer", "birth_year", "hobby", "pet", "food")
DERIVED = {"country": "city", "employer_city": "employer", "employer_industry": "employer"}
ENTITY = ("company_city", "company_industry", "city_country")

DOMAINS: dict[str, tuple[str, ...]] = {
    "city": CITIES,
    "job": JOBS,
    "employer": COMPANIES,
    "birth_year": BIRTH_YEARS,
    "hobby": HOBBIES,
    "pet": PETS,
    "food": FOODS,
    "country": COUNTRIES,
    "employer_city": CITIES,
    "employer_industry": INDUSTRIES,
    "company_city": CITIES,
    "company_industry": INDUSTRIES,
    "city_country": COUNTRIES,
}
