"""How models word refusals, by language: what `prefs.stages.phrases` looks for, as regular expressions over plain text.

A refusal is an act that the model says it does not do. Outside English three patterns say so: the words for "I cannot",
the acts (after them in the same clause; of languages that put the verb last, the other way round), and what refuses by
itself. Before them stand parts of words of which every refusal holds one: they are looked for first, which is quick.
"""

from __future__ import annotations

OTHER_LANGUAGES: dict[str, tuple[str, str, str, str]] = {
    "German": (
        "ich ",
        r"(?:ich (?:kann|werde|darf|möchte|will)|(?:kann|werde|darf|möchte"
        r"|will) ich)\b[^.!?]{0,80}?\b(?:nicht|kein\w*)\b"
        r"|ich bin nicht in der lage\b",
        r"\b(?:helfen|weiterhelfen|zu helfen|unterstützen|behilflich|schreiben|verfassen|erstellen|bereitstellen|geben"
        r"|liefern|anbieten|beantworten|erfüllen|nachkommen|entsprechen|teilnehmen|mitmachen|generieren|tun)\b",
        r"ich (?:muss|möchte)\b[^.!?]{0,60}\bablehnen\b|ich lehne\b[^.!?]{0,60}\bab\b|ich weigere mich\b",
    ),
    "French": (
        "je ",
        r"je (?:ne |n')(?:peux|pourrai|pourrais|vais|veux|souhaite|saurais|suis)\b",
        r"\b(?:aider|assister|fournir|écrire|rédiger|créer|générer|répondre|participer|donner|satisfaire"
        r"|produire|proposer"
        r"|faire (?:cela|ça))\b",
        r"je (?:dois|préfère)\b[^.!?]{0,40}\b(?:refuser|décliner)\b|je refuse d",
    ),
    "Spanish": (
        "no |debo |tengo |prefiero |niego ",
        r"no (?:puedo|podré|voy a|estoy en condiciones de|me es posible|debo|quiero)\b",
        r"\b(?:ayudar\w*|asistir\w*|proporcionar\w*|escribir\w*|crear|generar|cumplir|responder|participar|ofrecer\w*"
        r"|dar(?:te|le|les)?|brindar\w*|redactar|hacer (?:eso|esto)|hacerlo)\b",
        r"(?:debo|tengo que|prefiero) (?:\w+ )?(?:rechazar|negarme|declinar)\b|me niego a\b",
    ),
    "Italian": (
        "non |rifiut|declin",
        r"non (?:posso|potrò|sono in grado di|intendo|voglio)\b",
        r"\b(?:aiutar|assister|fornir|scriver|crear|generar|risponder|partecipar|offrir|soddisfar|dar|farl)\w*",
        r"devo (?:\w+ )?(?:rifiutar\w*|declinare)|mi rifiuto\b",
    ),
    "Portuguese": (
        "não |recus|declin",
        r"não (?:posso|poderei|vou|consigo|estou em condições de)\b",
        r"\b(?:ajud\w+|auxiliar\w*|fornecer\w*|escrever\w*|criar|gerar|atender|responder|participar"
        r"|oferecer|dar|produzir"
        r"|redigir|prestar|fazer isso)\b",
        r"(?:devo|preciso|tenho que|tenho de) (?:\w+ )?(?:recusar|declinar)|(?:me recuso|recuso-me) a\b",
    ),
    "Dutch": (
        "ik ",
        r"(?:ik (?:kan|zal|mag|wil)|(?:kan|zal|mag|wil) ik)\b[^.!?]{0,60}?\b(?:niet|geen)\b|ik ben niet in staat\b",
        r"\b(?:helpen|assisteren|verstrekken|schrijven|maken|geven|bieden|genereren|beantwoorden|voldoen|meewerken"
        r"|ondersteunen|doen)\b",
        r"ik moet\b[^.!?]{0,40}\b(?:weigeren|afwijzen)\b|ik weiger\b",
    ),
    "Polish": (
        "nie |odm",
        r"nie (?:mogę|będę|jestem w stanie|zamierzam|chcę)\b",
        r"\b(?:pomóc|pomagać|pomagał\w*|wspierać|dostarczyć|napisać|pisać|stworzyć|tworzyć|wygenerować|odpowiedzieć"
        r"|spełnić|udzielić|podać|uczestniczyć|udostępnić|zapewnić)\b",
        r"muszę (?:\w+ )?odmówić\b|odmawiam\b",
    ),
    "Russian": (
        "не |отказ",
        r"не (?:могу|буду|смогу|стану|в состоянии|имею возможности)\b",
        r"\b(?:помо|предостав|написать|писать|созда|сгенерировать|генерировать|ответить|отвечать|выполн"
        r"|участвовать|дать"
        r"|поддерж|содействовать|обсуждать)\w*",
        r"(?:вынужден\w*|должен|должна) отказать\w*|я отказываюсь\b",
    ),
    "Chinese": (
        "我|抱歉|对不起|對不起|遗憾|遺憾",
        r"(?:我|抱歉|对不起|對不起|遗憾|遺憾)[^。!?]{0,24}?(?:无法|無法|不能|不会|不會|不便|没办法|沒辦法|不可以)",
        r"(?:协助|協助|帮|幫|提供|满足|滿足|回答|回应|回應|撰写|撰寫|编写"
        r"|写|寫|生成|创作|创建|参与|參與|讨论|討論|支持|完成|配合)",
        r"我(?:必须|必須|只能|不得不|要)?(?:拒绝|拒絕|婉拒)",
    ),
    "Japanese": (
        "ませ|ない|かね|断|控",
        r"(?:手伝い|答え|応え|協力|提供|支援|サポート|対応|作成|生成|執筆|回答"
        r"|教え|応じる|受け|書く)(?:する)?(?:こと)?[はがも]?",
        r"(?<=.)(?:いた|致)?し?(?:でき(?:ません|ない|かね)|かねます)",
        r"お断り(?:し|させて|いた)|差し控えさせて",
    ),
    "Korean": (
        "없|않|어렵|거절",
        r"(?:도와|도움|제공|작성|생성|답변|응답|지원|참여|협조|수행|응해|들어|알려)",
        r"(?:수(?:는|가)? ?없|않겠|어렵습니다)",
        r"거절(?:하겠|해야|합니다)",
    ),
    "Arabic": (
        "لا |لن |لست |غير |أرفض",
        r"لا (?:أستطيع|استطيع|يمكنني|أقدر)|لن (?:أستطيع|أتمكن)|(?:لست|غير) قادر",
        r"(?:مساعد|أساعد|تقديم|أقدم|كتابة|أكتب|إنشاء|توفير|الإجابة|أجيب|المشاركة|تلبية|القيام|تنفيذ)",
        r"(?:يجب أن|علي أن|عليّ أن) أرفض|أرفض|لن (?:أساعد|أكتب|أقدم|أقوم)",
    ),
    "Turkish": (
        "ama|eme|amı|emi|redde",
        r"(?:yardımcı ol|yardım ed|sağlay|yaz|oluştur|üret|ver|yanıtlay|cevaplay|yerine getir|katıl|yap"
        r"|sun|paylaş)[ae]m",
        r"(?<=[ae]m)(?:am|em|ıyorum|iyorum|ayacağım|eyeceğim)\b",
        r"reddet(?:mek zorunday|iyor)",
    ),
    "Hindi": (
        "नहीं|असमर्थ",
        r"(?:मदद|सहायता|प्रदान|लिख|बना|उत्तर|जवाब|पूरा|सहयोग|उपलब्ध)",
        r"(?:नहीं (?:कर |दे |करा )?(?:सकता|सकती|सकते|करूंगा|करूँगा|करूंगी)|असमर्थ)",
        r"(?!)",
    ),
    "Indonesian": (
        "tidak |tak |menolak",
        r"(?:saya|aku) (?:tidak|tak) (?:dapat|bisa|akan|mampu)\b",
        r"\b(?:membantu|menyediakan|memberikan|menulis|membuat|menjawab|memenuhi|berpartisipasi|mendukung|melakukan)\b",
        r"saya menolak\b",
    ),
    "Vietnamese": (
        "tôi ",
        r"tôi (?:rất tiếc )?(?:không thể|không được phép|sẽ không)\b",
        r"\b(?:giúp|hỗ trợ|cung cấp|viết|tạo|trả lời|đáp ứng|tham gia|thực hiện)\b",
        r"tôi (?:phải )?từ chối\b",
    ),
}

_ACTS = (
    "help(?! but| it\\b| myself| feeling| thinking| wondering| noticing"
    "| smiling| falling)|assist|aid|support|write|provide"
    "|give(?! up| in)|share|create|generate|produce|compose|craft|draft"
    "|offer|supply|fulfil|fulfill|satisfy|comply|complete"
    "|engage|participate|take part|discuss|answer|respond|reply|continue|proceed|facilitate|enable|encourage|condone"
    "|endorse|promote|advise|explain|outline|teach|instruct|translate|roleplay|role-play|play along|pretend (?:to|that)"
    "|reveal|disclose|impersonate|simulate|depict|indulge|entertain"
    "|accommodate|honor|grant|carry out|go along|apologi[sz]e"
    "|be (?:a )?part of|be involved|make (?:that|this|such|a|an|any|jokes)"
    "|describe (?:that|this|such|how)|say (?:that|this)"
    "|tell you(?! (?:how (?:much|many|happy|glad|sorry)|for|exactly))"
    "|do (?:that|this|it|so|either|any of|what you|such)(?! (?:again|alone|any ?more))"
    "|(?:help|assist|writ|provid|giv|shar|creat|generat|produc|compos|craft|draft|offer|fulfill|comply|complet|engag"
    "|participat|discuss|answer|respond|reply|continu|proceed|support|explain|roleplay|pretend|do|tak)ing"
)
# What may stand between "I cannot" and the act, and the act.
_ACT = (
    r"(?:[\s,]+(?:\w+ly|and|or|nor|in|with|good|conscience|also|even|ever|just|so|will|would|can|could|not|cannot|can't"
    r"|won't|be|able|willing|going|to|either|under|any|circumstances|for|you|therefore|further|of))*[\s,]+"
    rf"(?:{_ACTS})\b"
)
_NOT = (
    r"(?:can ?not|can't|cant|won't|will not|shall not|should not|shouldn't|could not|couldn't|must not|am not going to)"
)
_ALSO = r"(?: \w+ly| also| still| just| do|,? therefore,?)*"
_AM = rf"i(?:'m| am){_ALSO}"
_MY_RULES = r"my (?:\w+ ){0,2}(?:programming|guidelines|principles|purpose|values|policies|policy|rules|protocols)"

ENGLISH_PARTS = (
    "not|n't|cant|unable|declin|refus|refrain|rather|prefer|no circ"
    "|no way|nor |neither|pass on|turn down|say no|stop you"
    "|sorry|no |prohibit|prevent|forbid|against|violat|avoid|ethical|wrong|appropriate"
    "|irresponsible|no,"
)
ENGLISH = (
    rf"(?<!if )(?<!when )i{_ALSO} {_NOT}{_ACT}",
    rf"{_AM} (?:not (?:able|willing|allowed|permitted|authorized|designed|prepared|programmed|going"
    rf"|in a position)|unable"
    r"|choosing not)"
    rf"{_ACT}",
    rf"(?:{_AM} not|i (?:do not|don't|wouldn't|would not) feel) (?:at all )?comfortable{_ACT}",
    rf"i (?:do not|don't) (?:want|wish){_ACT}",
    r"i (?:do not|don't) (?:\w+ly )?(?:help|assist|write|provide|create|generate|produce|engage|participate|share)"
    r" (?:with|in|that|this|these|those|such|any|content|material|instructions|information|guidance|advice|support)\b",
    rf"i(?:'d| would) (?:\w+ )?(?:rather|prefer) not(?:{_ACT}|[.,;])",
    rf"(?:under no circumstances|in no way|nor|neither) (?:can|will|would|could|should) i{_ACT}",
    r"i(?:'ll| will| must| have to| need to|'m (?:going|choosing) to| am going to| can only|'d like to)?"
    r"(?: have to| need to| must)?(?: \w+ly)* (?:decline|refuse|pass on|turn down|say no)"
    r"(?=[.,;!:]|$| (?:to )?(?:this|that|your|the|such|it|requests?)\b| to (?:\w+ly )?(?:\w+ )?"
    rf"(?:{_ACTS})\b)",
    rf"i (?:must|have to|need to) (?:stop you|refrain from(?:{_ACT}))",
    rf"(?:not|isn't) something (?:that )?i(?:(?: can|'ll| will| would| could)(?:{_ACT}| do\b)"
    r"|(?:'m| am) (?:able|willing|going|prepared|comfortable|allowed)\b| can\b(?! \w))",
    r"something (?:that )?i (?:won't|will not|refuse to|can't|cannot)\b",
    rf"(?:(?<=[.!?:-] )|sorry,? (?:but )?|unfortunately,? )(?:can't|cannot|can not|won't|unable to|not able to){_ACT}",
    rf"i(?:'m| am|'ve been| have been| was){_ALSO} (?:programmed|designed|trained|instructed|built)(?: \w+ly)?"
    r" (?:not to|to (?:\w+ly )?(?:refuse|decline|avoid))\b",
    rf"{_MY_RULES} (?:\w+ )?(?:prohibits?|prevents?|forbids?|(?:do|does) not allow|don't allow|doesn't allow)\b",
    rf"(?:goes|go|going|is|are|run) (?:\w+ly )?against {_MY_RULES}|violat(?:es?|ing) {_MY_RULES}",
    r"it(?:'s| is| would) (?:not be|not|be) ?(?:in)?(?:appropriate|ethical|right|possible|unethical"
    r"|irresponsible|wrong)"
    r" for me to\b",
)
# At the very beginning.
ENGLISH_OPENINGS = (
    r"(?:i'm |i am )?(?:\w+ly )?sorry,? (?:but )?no\b",
    r"no\w*\W+i (?:can't|cannot|won't|will not)\b",
    r"(?:absolutely not|no way|not a chance)\W*(?:$|(?:i|this|that|your)\b)",
    rf"(?:can't|cannot|can not|won't|unable to|not able to){_ACT}",
)
