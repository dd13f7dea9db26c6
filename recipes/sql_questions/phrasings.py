"""The ways to ask. No phrase of train, validation or test is in another split; `more` adds to those of train.

A question is a *frame* with a *condition* put in. Slots: {A} the columns asked for, {sg} and {pl} what a row
is and many rows are, {C} the condition, {n} a column, {v} and {w} values, {g} the column to group by, {k} how
many, {sup} "heaviest".
"""

CONDITIONS = {
    "eq": {
        "train": ["whose {n} is {v}", "with {n} {v}", "where the {n} is {v}", "with {v} as the {n}"],
        "validation": ["the {n} of which is {v}", "for which the {n} is {v}"],
        "test": ["having {v} as {n}", "showing {v} as the {n}", "whose {n} is given as {v}"],
    },
    "eq number": {
        "train": ["whose {n} is exactly {v}", "where the {n} equals {v}", "with {n} equal to {v}"],
        "validation": ["the {n} of which is exactly {v}"],
        "test": ["whose {n} is precisely {v}", "having exactly {v} as {n}"],
    },
    "ne": {
        "train": ["whose {n} is not {v}", "with {n} other than {v}", "where the {n} is not {v}", "with any {n} but {v}"],
        "validation": ["the {n} of which is not {v}", "for which the {n} is not {v}"],
        "test": ["whose {n} differs from {v}", "not showing {v} as the {n}", "having a different {n} than {v}"],
    },
    "gt": {
        "train": [
            "with {n} over {v}", "whose {n} is more than {v}", "whose {n} is above {v}",
            "where the {n} is greater than {v}", "with {n} higher than {v}", "where {n} exceeds {v}",
        ],
        "validation": ["the {n} of which is above {v}", "whose {n} is larger than {v}"],
        "test": ["whose {n} exceeds {v}", "having {n} of more than {v}", "whose {n} goes over {v}", "with the {n} greater than {v}"],
    },
    "lt": {
        "train": [
            "with {n} under {v}", "whose {n} is less than {v}", "whose {n} is below {v}",
            "where the {n} is smaller than {v}", "with {n} lower than {v}", "where {n} stays below {v}",
        ],
        "validation": ["the {n} of which is below {v}", "whose {n} is lower than {v}"],
        "test": ["whose {n} stays under {v}", "having {n} of less than {v}", "whose {n} remains below {v}", "with the {n} smaller than {v}"],
    },
    "gt year": {
        "train": ["whose {n} is after {v}", "with {n} later than {v}", "where the {n} is after {v}", "with {n} past {v}"],
        "validation": ["the {n} of which is after {v}"],
        "test": ["whose {n} comes after {v}", "having {n} later than {v}"],
    },
    "lt year": {
        "train": ["whose {n} is before {v}", "with {n} earlier than {v}", "where the {n} is before {v}", "with {n} prior to {v}"],
        "validation": ["the {n} of which is before {v}"],
        "test": ["whose {n} comes before {v}", "having {n} earlier than {v}"],
    },
    "starts": {
        "train": ["whose {n} starts with {v}", "with {n} beginning with {v}", "where the {n} starts with {v}"],
        "validation": ["the {n} of which starts with {v}"],
        "test": ["whose {n} begins with {v}", "having {n} that starts with {v}"],
    },
    "ends": {
        "train": ["whose {n} ends with {v}", "with {n} ending in {v}", "where the {n} ends with {v}"],
        "validation": ["the {n} of which ends with {v}"],
        "test": ["whose {n} ends in {v}", "having {n} that ends with {v}"],
    },
    "contains": {
        "train": ["whose {n} contains {v}", "with {v} in the {n}", "where the {n} includes {v}", "whose {n} has {v} in it"],
        "validation": ["with {v} somewhere in the {n}"],
        "test": ["whose {n} includes {v}", "having {n} that contains {v}"],
    },
    "either": {
        "train": ["whose {n} is {v} or {w}", "with {n} {v} or {w}", "where the {n} is {v} or {w}"],
        "validation": ["the {n} of which is {v} or {w}"],
        "test": ["whose {n} is either {v} or {w}", "having {v} or {w} as {n}"],
    },
    "range": {
        "train": ["with {n} over {v} and under {w}", "whose {n} is more than {v} but less than {w}", "whose {n} is above {v} and below {w}"],
        "validation": ["the {n} of which is above {v} and below {w}"],
        "test": ["whose {n} exceeds {v} but stays under {w}", "having {n} of more than {v} and less than {w}"],
    },
}  # fmt: skip
TWO = {
    "AND": {"train": ["{C} and {D}", "{C} and also {D}"], "validation": ["{C}, and {D}"], "test": ["{C} as well as {D}", "{C} and at the same time {D}"]},
    "OR": {"train": ["{C} or {D}"], "validation": ["{C}, or {D}"], "test": ["{C} or else {D}", "either {C} or {D}"]},
}  # fmt: skip
SELECT = {
    "train": [
        "Show the {A} of the {pl} {C}.", "What is the {A} of each {sg} {C}?", "List the {A} for every {sg} {C}.",
        "Give me the {A} of {pl} {C}.", "I need the {A} of all {pl} {C}.", "Find the {A} of any {sg} {C}.",
        "For {pl} {C}, show the {A}.", "Return the {A} of {pl} {C}.",
    ],
    "validation": ["Tell me the {A} of all the {pl} {C}.", "Can you list the {A} of the {pl} {C}?", "Get the {A} for {pl} {C}."],
    "test": [
        "Could you look up the {A} of the {pl} {C}?", "Report the {A} for those {pl} {C}.", "Print the {A} of each {sg} {C}.",
        "I would like to see the {A} of {pl} {C}.", "Please fetch the {A} of every {sg} {C}.",
    ],
}  # fmt: skip
NAMES = {  # the first column, though no column is named
    "train": [
        "Which {pl} are there {C}?",
        "Name the {pl} {C}.",
        "List all {pl} {C}.",
        "Which are the {pl} {C}?",
    ],
    "validation": ["Tell me the {pl} {C}.", "Can you name every {sg} {C}?"],
    "test": ["Pick out the {pl} {C}.", "Could you name the {pl} {C}?", "I am looking for {pl} {C}."],
}
LOOKUP = {
    "train": ["What is the {A} of {v}?", "Show the {A} of {v}.", "For {v}, what is the {A}?", "Give the {A} of the {sg} {v}."],
    "validation": ["Tell me the {A} of {v}.", "Can you find the {A} of the {sg} {v}?"],
    "test": ["Could you look up the {A} of {v}?", "Report the {A} for the {sg} {v}.", "I would like to know the {A} of {v}."],
}  # fmt: skip
COUNT = {
    "train": [
        "How many {pl} are there {C}?", "Count the {pl} {C}.", "What is the number of {pl} {C}?",
        "How many {pl} do we have {C}?", "Give the number of {pl} {C}.", "Find out how many {pl} there are {C}.",
    ],
    "validation": ["Tell me how many {pl} there are {C}.", "Can you count the {pl} {C}?"],
    "test": [
        "In total, how many {pl} are listed {C}?", "Work out how many {pl} exist {C}.", "What is the count of {pl} {C}?",
        "I would like to know the number of {pl} {C}.",
    ],
}  # fmt: skip
AGGREGATE = {
    "AVG": {
        "train": ["What is the average {n} of the {pl}{C}?", "Compute the mean {n} of {pl}{C}.", "Show the average {n} for {pl}{C}.", "What is the {n} of {pl}{C} on average?"],
        "validation": ["Tell me the average {n} of all {pl}{C}.", "Can you find the mean {n} for the {pl}{C}?"],
        "test": ["Work out the average {n} across the {pl}{C}.", "I would like to know the mean {n} of the {pl}{C}.", "On average, what is the {n} of {pl}{C}?"],
    },
    "SUM": {
        "train": ["What is the total {n} of the {pl}{C}?", "Add up the {n} of {pl}{C}.", "What is the sum of the {n} of {pl}{C}?", "Show the total {n} for {pl}{C}."],
        "validation": ["Tell me the total {n} of all {pl}{C}.", "Can you sum the {n} for the {pl}{C}?"],
        "test": ["Work out the total {n} across the {pl}{C}.", "I would like to know the sum of the {n} over the {pl}{C}.", "In total, what is the {n} of {pl}{C}?"],
    },
    "MAX": {
        "train": ["What is the highest {n} of the {pl}{C}?", "What is the largest {n} among {pl}{C}?", "Find the maximum {n} of {pl}{C}.", "Show the highest {n} for {pl}{C}."],
        "validation": ["Tell me the highest {n} of all {pl}{C}.", "Can you find the maximum {n} for the {pl}{C}?"],
        "test": ["Work out the highest {n} across the {pl}{C}.", "I would like to know the maximum {n} of the {pl}{C}.", "Of all {pl}{C}, what is the largest {n}?"],
    },
    "MIN": {
        "train": ["What is the lowest {n} of the {pl}{C}?", "What is the smallest {n} among {pl}{C}?", "Find the minimum {n} of {pl}{C}.", "Show the lowest {n} for {pl}{C}."],
        "validation": ["Tell me the lowest {n} of all {pl}{C}.", "Can you find the minimum {n} for the {pl}{C}?"],
        "test": ["Work out the lowest {n} across the {pl}{C}.", "I would like to know the minimum {n} of the {pl}{C}.", "Of all {pl}{C}, what is the smallest {n}?"],
    },
    "MAX year": {
        "train": ["What is the latest {n} of the {pl}{C}?", "Find the most recent {n} among {pl}{C}."],
        "validation": ["Tell me the latest {n} of all {pl}{C}."],
        "test": ["Of all {pl}{C}, what is the latest {n}?", "I would like to know the most recent {n} of the {pl}{C}."],
    },
    "MIN year": {
        "train": ["What is the earliest {n} of the {pl}{C}?", "Find the earliest {n} among {pl}{C}."],
        "validation": ["Tell me the earliest {n} of all {pl}{C}."],
        "test": ["Of all {pl}{C}, what is the earliest {n}?", "I would like to know the earliest {n} of the {pl}{C}."],
    },
}  # fmt: skip
# each with the words for (down, up), and for years
EXTREME = {
    "train": ["Which {sg} has the {high} {n}?", "Find the {sg} with the {high} {n}.", "Name the {sg} with the {high} {n}."],
    "validation": ["Tell me which {sg} has the {high} {n}.", "Can you name the {sg} with the {high} {n}?"],
    "test": ["Of all {pl}, which has the {high} {n}?", "Pick out the {sg} with the {high} {n}.", "I am looking for the {sg} with the {high} {n}."],
}  # fmt: skip
EXTREME_OF = {
    "train": ["What is the {A} of the {sg} with the {high} {n}?", "Show the {A} of the {sg} that has the {high} {n}."],
    "validation": ["Tell me the {A} of the {sg} with the {high} {n}."],
    "test": ["Could you look up the {A} of the {sg} with the {high} {n}?", "Report the {A} for the {sg} having the {high} {n}."],
}  # fmt: skip
EXTREME_C = {
    "train": ["Of the {pl} {C}, which has the {high} {n}?", "Which {sg} {C} has the {high} {n}?"],
    "validation": ["Tell me which {sg} {C} has the {high} {n}."],
    "test": ["Among {pl} {C}, which one has the {high} {n}?", "Pick out the {sg} with the {high} {n} among {pl} {C}."],
}  # fmt: skip
SUPERLATIVE = {
    "train": ["Which {sg} is the {sup}?", "Show the {sup} {sg}.", "What is the {sup} {sg}?"],
    "validation": ["Tell me the {sup} {sg}.", "Can you name the {sup} {sg}?"],
    "test": ["Of all {pl}, which is the {sup}?", "Pick out the {sup} {sg}."],
}
SUPERLATIVE_OF = {
    "train": ["What is the {A} of the {sup} {sg}?", "Give the {A} of the {sup} {sg}."],
    "validation": ["Tell me the {A} of the {sup} {sg}."],
    "test": ["Could you look up the {A} of the {sup} {sg}?", "Report the {A} for the {sup} {sg}."],
}
TOP = {
    "train": ["Show the {k} {pl} with the {high} {n}.", "Which {k} {pl} have the {high} {n}?", "List the {k} {pl} with the {high} {n}."],
    "validation": ["Tell me the {k} {pl} with the {high} {n}."],
    "test": ["Pick out the {k} {pl} with the {high} {n}.", "Of all {pl}, which {k} have the {high} {n}?"],
}  # fmt: skip
TOP_OF = {
    "train": ["Show the {A} of the {k} {pl} with the {high} {n}.", "List the {A} for the {k} {pl} with the {high} {n}."],
    "validation": ["Tell me the {A} of the {k} {pl} with the {high} {n}."],
    "test": ["Report the {A} for the {k} {pl} having the {high} {n}.", "Could you look up the {A} of the {k} {pl} with the {high} {n}?"],
}  # fmt: skip
SORTED = {
    "train": ["List the {A} of all {pl}, sorted by {n} {down}.", "Show the {A} of the {pl} ordered by {n}, {down}.", "Sort the {pl} by {n} {down} and show the {A}."],
    "validation": ["Tell me the {A} of all {pl} by {n}, {down}.", "Can you list the {A} of the {pl} sorted by {n}, {down}?"],
    "test": ["Arrange the {pl} by {n}, {down}, and report the {A}.", "Print the {A} of every {sg} in order of {n}, {down}."],
}  # fmt: skip
HIGH = {True: ["highest", "largest"], False: ["lowest", "smallest"]}
HIGH_YEAR = {True: ["latest", "most recent"], False: ["earliest"]}
DOWN = {
    True: {"train": ["from high to low", "highest first", "in descending order"], "validation": ["descending", "starting with the highest"], "test": ["largest first", "from highest to lowest"]},
    False: {"train": ["from low to high", "lowest first", "in ascending order"], "validation": ["ascending", "starting with the lowest"], "test": ["smallest first", "from lowest to highest"]},
}  # fmt: skip
DOWN_YEAR = {
    True: {"train": ["latest first", "from latest to earliest"], "validation": ["starting with the latest"], "test": ["most recent first"]},
    False: {"train": ["earliest first", "from earliest to latest"], "validation": ["starting with the earliest"], "test": ["the earliest coming first"]},
}  # fmt: skip
GROUP_COUNT = {
    "train": ["How many {pl} are there for each {g}?", "Count the {pl} per {g}.", "Show the number of {pl} by {g}.", "For each {g}, how many {pl} are there?"],
    "validation": ["Tell me how many {pl} each {g} has.", "Can you count the {pl} by {g}?"],
    "test": ["For every {g}, give the number of {pl}.", "Break down the count of {pl} by {g}.", "Work out how many {pl} exist per {g}."],
}  # fmt: skip
GROUP_AGGREGATE = {
    "train": ["What is the {f} {n} of {pl} for each {g}?", "Show the {f} {n} per {g}.", "For each {g}, what is the {f} {n} of the {pl}?", "List the {f} {n} of the {pl} by {g}."],
    "validation": ["Tell me the {f} {n} of the {pl} for each {g}.", "Can you show the {f} {n} by {g}?"],
    "test": ["For every {g}, give the {f} {n} of its {pl}.", "Break down the {f} {n} of the {pl} by {g}.", "Work out the {f} {n} per {g}."],
}  # fmt: skip
GROUP_WORDS = {
    "AVG": ["average", "mean"],
    "SUM": ["total"],
    "MAX": ["highest", "maximum"],
    "MIN": ["lowest", "minimum"],
}
DISTINCT = {
    "train": ["List the distinct {n} of the {pl}.", "Which different values of {n} do the {pl} have?", "Show every different {n} among the {pl}."],
    "validation": ["Tell me each different {n} of the {pl}."],
    "test": ["Print every distinct {n} found among the {pl}.", "Without repeats, report the {n} of the {pl}."],
}  # fmt: skip
DISTINCT_C = {
    "train": ["List the distinct {n} of the {pl} {C}.", "Show every different {n} among {pl} {C}."],
    "validation": ["Tell me each different {n} of the {pl} {C}."],
    "test": [
        "Print every distinct {n} found among {pl} {C}.",
        "Without repeats, report the {n} of {pl} {C}.",
    ],
}
DISTINCT_COUNT = {
    "train": [
        "How many different {n} values do the {pl} have?",
        "Count the distinct {n} values of the {pl}.",
    ],
    "validation": ["Tell me how many different {n} values the {pl} have."],
    "test": ["What is the count of distinct {n} values among the {pl}?"],
}
JOIN = {  # {C} is about the {ps}
    "train": ["Show the {A} of the {pl} that belong to a {ps} {C}.", "List the {A} of {pl} that have a {ps} {C}.", "For {pl} that have a {ps} {C}, show the {A}.", "Give me the {A} of each {sg} belonging to a {ps} {C}."],
    "validation": ["Tell me the {A} of the {pl} linked to a {ps} {C}."],
    "test": ["Report the {A} for those {pl} that go with a {ps} {C}.", "Could you look up the {A} of the {pl} assigned to a {ps} {C}?"],
}  # fmt: skip
JOIN_COUNT = {
    "train": ["How many {pl} belong to a {ps} {C}?", "Count the {pl} that have a {ps} {C}."],
    "validation": ["Tell me how many {pl} are linked to a {ps} {C}."],
    "test": [
        "Work out how many {pl} go with a {ps} {C}.",
        "What is the count of {pl} assigned to a {ps} {C}?",
    ],
}
JOIN_BOTH = {  # a column of each table
    "train": ["Show the {A} of each {sg} together with the {B} of its {ps}.", "For every {sg}, list the {A} and the {B} of the {ps}."],
    "validation": ["Tell me the {A} of every {sg} and the {B} of its {ps}."],
    "test": ["Print the {A} of each {sg} next to the {B} of its {ps}.", "Report every {sg}'s {A} along with the {B} of the {ps}."],
}  # fmt: skip
JOIN_BOTH_C = {
    "train": ["Show the {A} and the {ps}'s {B} of the {pl} {C}.", "For {pl} {C}, list the {A} and the {B} of the {ps}."],
    "validation": ["Tell me the {A} and the {B} of the {ps} for all {pl} {C}."],
    "test": ["Report the {A} for {pl} {C}, along with the {B} of the {ps}."],
}  # fmt: skip
# what `more` has beyond train: new ways to ask, none of them one of validation or test
MORE = [
    (CONDITIONS["eq"], ["where {v} is the {n}", "if the {n} is {v}", "of {n} {v}"]),
    (CONDITIONS["eq number"], ["with {n} at {v}", "provided the {n} is just {v}"]),
    (CONDITIONS["ne"], ["where {v} is not the {n}", "if the {n} is anything but {v}", "with another {n} than {v}"]),
    (CONDITIONS["gt"], ["with more than {v} as the {n}", "if the {n} is over {v}", "beating {v} in {n}", "with {n} bigger than {v}"]),
    (CONDITIONS["lt"], ["with less than {v} as the {n}", "if the {n} is under {v}", "not reaching {v} in {n}", "with {n} short of {v}"]),
    (CONDITIONS["gt year"], ["if the {n} is later than {v}", "with {n} only after {v}"]),
    (CONDITIONS["lt year"], ["if the {n} is earlier than {v}", "with {n} already before {v}"]),
    (CONDITIONS["starts"], ["provided the {n} begins with {v}", "with {v} at the start of the {n}"]),
    (CONDITIONS["ends"], ["provided the {n} finishes with {v}", "with {v} at the end of the {n}"]),
    (CONDITIONS["contains"], ["provided {v} is a part of the {n}", "with {n} containing {v}"]),
    (CONDITIONS["either"], ["provided the {n} is {v} or {w}", "with {v} or {w} as the {n}"]),
    (CONDITIONS["range"], ["with {n} higher than {v} and lower than {w}", "if the {n} is greater than {v} but smaller than {w}"]),
    (TWO["AND"], ["{C} but only those {D}", "both {C} and {D}"]),
    (TWO["OR"], ["{C} or alternatively {D}", "{C} or, if not, {D}"]),
    (SELECT, ["I want the {A} of the {pl} {C}.", "Which {A} do the {pl} {C} have?", "Look at the {pl} {C} and give their {A}.", "Let me see the {A} of every {sg} {C}.", "{A} of {pl} {C}, please."]),
    (NAMES, ["Show me the {pl} {C}.", "I want every {sg} {C}.", "Give me all the {pl} {C}."]),
    (LOOKUP, ["I need the {A} of {v}.", "Let me see the {A} of the {sg} {v}.", "Which {A} does {v} have?", "Take {v}: what is its {A}?"]),
    (COUNT, ["I want the number of {pl} {C}.", "Show how many {pl} there are {C}.", "How large is the number of {pl} {C}?", "The {pl} {C}: how many are they?"]),
    (AGGREGATE["AVG"], ["Give me the average {n} of all the {pl}{C}.", "What {n} do {pl}{C} have on average?", "Take the mean of the {n} over {pl}{C}."]),
    (AGGREGATE["SUM"], ["Give me the total {n} of all the {pl}{C}.", "Taken together, what {n} do {pl}{C} have?", "What do the {n} figures of {pl}{C} add up to?"]),
    (AGGREGATE["MAX"], ["Give me the highest {n} of all the {pl}{C}.", "How high does the {n} of {pl}{C} go?", "The largest {n} of any of the {pl}{C} is what?"]),
    (AGGREGATE["MIN"], ["Give me the lowest {n} of all the {pl}{C}.", "How low does the {n} of {pl}{C} go?", "The smallest {n} of any of the {pl}{C} is what?"]),
    (AGGREGATE["MAX year"], ["Give me the latest {n} of the {pl}{C}.", "What is the last {n} of any of the {pl}{C}?"]),
    (AGGREGATE["MIN year"], ["Give me the earliest {n} of the {pl}{C}.", "What is the first {n} of any of the {pl}{C}?"]),
    (EXTREME, ["Show me the {sg} that has the {high} {n}.", "Whose {n} is the {high} among the {pl}?", "Give the {sg} whose {n} is the {high}."]),
    (EXTREME_OF, ["Take the {sg} with the {high} {n}: what is its {A}?", "Find the {A} of the {sg} whose {n} is the {high}."]),
    (EXTREME_C, ["Show the {sg} with the {high} {n} of those {C}.", "Only counting {pl} {C}, which has the {high} {n}?"]),
    (SUPERLATIVE, ["Give me the {sup} one of the {pl}.", "Find the {sup} {sg}."]),
    (SUPERLATIVE_OF, ["Show the {A} of the {sup} one of the {pl}.", "Take the {sup} {sg}: what is its {A}?"]),
    (TOP, ["Give me the {k} {pl} that have the {high} {n}.", "Find {k} {pl}, those with the {high} {n}."]),
    (TOP_OF, ["What is the {A} of the {k} {pl} with the {high} {n}?", "Take the {k} {pl} that have the {high} {n} and show their {A}."]),
    (SORTED, ["Give me the {A} of every {sg}, by {n} {down}.", "Put the {pl} in order of {n}, {down}, and list the {A}."]),
    (DOWN[True], ["with the highest at the top", "going down"]),
    (DOWN[False], ["with the lowest at the top", "going up"]),
    (DOWN_YEAR[True], ["with the latest at the top"]),
    (DOWN_YEAR[False], ["with the earliest at the top"]),
    (GROUP_COUNT, ["Group the {pl} by {g} and count them.", "What is the number of {pl} in each {g}?", "Give me every {g} with its number of {pl}."]),
    (GROUP_AGGREGATE, ["Group the {pl} by {g} and show the {f} {n}.", "What {f} {n} does each {g} have?", "Give me every {g} with the {f} {n} of its {pl}."]),
    (DISTINCT, ["What different {n} entries are there among the {pl}?", "Give me each {n} of the {pl} only once."]),
    (DISTINCT_C, ["Give me each {n} of the {pl} {C} only once.", "Which different values of {n} do {pl} {C} have?"]),
    (DISTINCT_COUNT, ["What is the number of different {n} values of the {pl}?", "How many {n} values are there among the {pl}, each counted once?"]),
    (JOIN, ["I need the {A} of {pl} of a {ps} {C}.", "Take each {ps} {C} and show the {A} of its {pl}.", "What is the {A} of the {pl} under a {ps} {C}?"]),
    (JOIN_COUNT, ["What is the number of {pl} of a {ps} {C}?", "I want to know how many {pl} come under a {ps} {C}."]),
    (JOIN_BOTH, ["Give me the {A} of all {pl} and, for each, the {B} of the {ps}.", "List every {sg} by its {A}, adding the {B} of the {ps}."]),
    (JOIN_BOTH_C, ["Take the {pl} {C} and give the {A} and the {B} of the {ps}.", "What are the {A} and the {ps}'s {B} for {pl} {C}?"]),
]  # fmt: skip
for phrasings, new in MORE:
    phrasings["more"] = phrasings["train"] + new
