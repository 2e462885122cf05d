"""Chat templates in the styles of known families of models, and conversations."""

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}
{% set system_message = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% else %}
{% set loop_messages = messages %}
{% set system_message = '' %}
{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if loop.index0 == 0 %}
{% set content = system_message + message['content'] %}
{% else %}
{% set content = message['content'] %}
{% endif %}
{% if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
{{- ' ' + content.strip() + ' ' + eos_token }}
{%- endif %}
{% endfor %}
"""

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim "
    "+ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""

# Namespaces, macros, tests, the filters of JSON, loop controls, and generation.
TOOLS = """\
{%- set ns = namespace(system='', count=0) %}
{%- macro header(role) -%}
<|start_header_id|>{{ role }}<|end_header_id|>

{% endmacro %}
{%- for message in messages %}
    {%- if message.role == 'system' and message.content is string %}
        {%- set ns.system = message.content | trim %}
        {%- continue %}
    {%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- if ns.count > 5 %}{% break %}{% endif %}
    {{- header(message.role) }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content }}<|eot_id|>{% endgeneration %}
    {%- else %}
        {{- message.content }}<|eot_id|>
    {%- endif %}
    {%- if message.tool_calls is defined %}
        {{- message.tool_calls | tojson(indent=2) }}
    {%- endif %}
{%- endfor %}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson }}{% if not loop.last %}, {% endif %}
    {%- endfor %}
{%- endif %}
{{- ns.system | default('none', true) | upper }}
{%- if strftime_now is defined and strftime_now('%Y') | int > 2000 %} dated{% endif %}
{%- if bos_token is defined %}{{ bos_token }}{% endif -%}
{{ messages | map(attribute='role') | join(',') }}
{{ dict(a=1, b='<&>') | tojson }}
{%- if unknown is not defined %} {{ '%s' | format(ns.count) }}{% endif %}
"""

LOOPS = (
    "{% for x in [[[]], []] recursive %}{{ loop.index }}/{{ loop.length }}"
    "{{ ',' if not loop.last }}{{ loop(x) }}{% else %}-{% endfor %}"
    "{% for x in nothing %}x{% else %}none{% endfor %}"
    "{% for key, value in {'a': 1, 'b': 2}.items() if value > 1 %}"
    "{{ loop.first }}{{ key }}{{ loop.previtem is defined }}{% endfor %}"
)

STYLES = {
    "chatml": CHATML,
    "llama-2": LLAMA_2,
    "gemma": GEMMA,
    "zephyr": ZEPHYR,
    "tools": TOOLS,
    "loops": LOOPS,
}

USER = {"role": "user", "content": " the fox & the <dog> "}
ASSISTANT = {"role": "assistant", "content": "naïve 日本\n\n  yes "}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": {"é": None, "x": [1]}}]}

CONVERSATIONS = {
    "one turn": [USER],
    "two turns": [USER, ASSISTANT, USER],
    "finished": [USER, ASSISTANT],
    "system": [SYSTEM, USER, ASSISTANT, USER],
    "calls": [USER, CALL, USER],
    "no content": [USER, {**ASSISTANT, "tool_calls": None}],
}

SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|eot_id|>", "<|start_header_id|>"),
)
"""Added tokens, from number 300 on."""


def settings(template):
    """Return a `tokenizer_config.json` with a template and the special tokens."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    flags |= {"normalized": False, "special": True}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "added_tokens_decoder": {
            str(300 + i): {"content": text, **flags} for i, text in enumerate(SPECIAL)
        },
        "chat_template": template,
    }
