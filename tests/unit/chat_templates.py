"""Chat templates of public families, written down from their documented form."""
# ruff: noqa: RUF001 - the tokens are the families' own

CHATML = """
{%- for m in messages %}
  {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

QWEN3 = """
{%- if tools %}{{ '<|im_start|>system\n# Tools\n<tools>' }}
{%- for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}
{{- '\n</tools><|im_end|>\n' }}{% endif %}
{%- set ns = namespace(last=messages | length - 1, found=false) %}
{%- for m in messages[::-1] %}
  {%- if not ns.found and m.role == 'user' %}
    {%- set ns.last = messages | length - 1 - loop.index0 %}{% set ns.found = true %}
  {%- endif %}
{%- endfor %}
{%- for m in messages %}
  {%- set content = m.content %}
  {%- if m.role == 'user' or m.role == 'system' %}
    {{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}
  {%- elif m.role == 'assistant' %}
    {%- set reasoning = '' %}
    {%- if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}
    {%- elif '</think>' in m.content %}
      {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
      {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\n' }}
    {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
      {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
    {%- else %}{{ content }}{% endif %}
    {%- for call in m.tool_calls or [] %}
      {%- if (loop.first and content) or not loop.first %}{{ '\n' }}{% endif %}
      {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
      {%- if call.function.arguments is string %}{{ call.function.arguments }}
      {%- else %}{{ call.function.arguments | tojson }}{% endif %}{{ '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
  {%- else %}
    {{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\n\n</think>\n\n' }}
  {%- endif %}
{%- endif %}"""

LLAMA3 = """
{{- bos_token }}
{%- for m in messages %}
  {%- set role = 'ipython' if m.role == 'tool' else m.role %}
  {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
  {%- if m.tool_calls %}
    {%- if m.tool_calls | length != 1 %}{{ raise_exception('single tool-calls only') }}{% endif %}
    {%- set call = m.tool_calls[0].function %}
    {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
  {%- else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

HARMONY = """
{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- set last = namespace(call=none) %}
{%- for m in messages %}
  {%- if m.role == 'system' or m.role == 'developer' %}
    {{- '<|start|>developer<|message|># Instructions\n\n' + m.content + '<|end|>' }}
  {%- elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
  {%- elif m.role == 'tool' %}
    {{- '<|start|>functions.' + last.call + ' to=assistant<|channel|>commentary<|message|>' }}
    {{- m.content | tojson + '<|end|>' }}
  {%- elif 'tool_calls' in m %}
    {%- set call = m.tool_calls[0].function %}
    {%- set ns = namespace(answered=false) %}
    {%- for later in messages[loop.index:] %}
      {%- if later.role == 'assistant' and 'tool_calls' not in later %}
        {%- set ns.answered = true %}
      {%- endif %}
    {%- endfor %}
    {%- if m.thinking and not ns.answered %}
      {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
    {%- endif %}
    {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
    {{- call.arguments | tojson + '<|call|>' }}
    {%- set last.call = call.name %}
  {%- elif loop.last and not add_generation_prompt %}
    {%- if 'thinking' in m %}
      {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
    {%- endif %}
    {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
  {%- else %}
    {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

DEEPSEEK_V3 = """
{%- set ns = namespace(tool=false) %}{{ bos_token }}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{%- for m in messages %}
  {%- if m.role == 'user' %}{% set ns.tool = false %}{{ '<｜User｜>' + m.content }}
  {%- elif m.role == 'assistant' and m.content is none %}
    {%- set ns.tool = false %}
    {%- for call in m.tool_calls %}
      {{- '<｜Assistant｜><｜tool▁calls▁begin｜>' if loop.first else '\n' }}
      {{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name }}
      {{- '\n```json\n' + call.function.arguments + '\n```<｜tool▁call▁end｜>' }}
    {%- endfor %}{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
  {%- elif m.role == 'assistant' %}
    {%- if ns.tool %}{{ '<｜tool▁outputs▁end｜>' + m.content + '<｜end▁of▁sentence｜>' }}
    {%- else %}{{ '<｜Assistant｜>' + CONTENT + '<｜end▁of▁sentence｜>' }}{% endif %}
    {%- set ns.tool = false %}
  {%- elif m.role == 'tool' %}
    {{- '\n' if ns.tool else '<｜tool▁outputs▁begin｜>' }}{% set ns.tool = true %}
    {{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
  {%- endif %}
{%- endfor %}
{%- if ns.tool %}{{ '<｜tool▁outputs▁end｜>' }}{% endif %}
{%- if add_generation_prompt and not ns.tool %}{{ '<｜Assistant｜>THINK' }}{% endif %}"""
DEEPSEEK_R1 = DEEPSEEK_V3.replace("CONTENT", "m.content.split('</think>')[-1]").replace(
    "THINK", "<think>\\n"
)
DEEPSEEK_V31 = """
{%- set ns = namespace(asked=false) %}{{ bos_token }}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{%- for m in messages %}
  {%- if m.role == 'user' %}{% set ns.asked = true %}{{ '<｜User｜>' + m.content }}
  {%- elif m.role == 'assistant' %}
    {%- if ns.asked %}{{ '<｜Assistant｜></think>' }}{% endif %}{% set ns.asked = false %}
    {%- if m.tool_calls %}
      {{- (m.content or '') + '<｜tool▁calls▁begin｜>' }}
      {%- for call in m.tool_calls %}
        {{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' }}
        {{- call.function.arguments + '<｜tool▁call▁end｜>' }}
      {%- endfor %}{{ '<｜tool▁calls▁end｜>' }}
    {%- else %}{{ m.content.split('</think>', 1)[-1] }}{% endif %}{{ '<｜end▁of▁sentence｜>' }}
  {%- elif m.role == 'tool' %}
    {%- set ns.asked = false %}
    {{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and ns.asked %}
  {{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}
{%- endif %}"""
DEEPSEEK_V3 = DEEPSEEK_V3.replace("CONTENT", "m.content").replace("THINK", "")

KIMI_K2 = """
{%- if tools %}
  {{- '<|im_system|>tool_declare<|im_middle|>' + tools | tojson + '<|im_end|>' }}
{%- endif %}
{%- for m in messages %}
  {%- if m.role == 'user' %}{{ '<|im_user|>user<|im_middle|>' }}
  {%- elif m.role == 'assistant' %}{{ '<|im_assistant|>assistant<|im_middle|>' }}
  {%- else %}{{ '<|im_system|>' + (m.name or m.role) + '<|im_middle|>' }}{% endif %}
  {%- if m.tool_calls %}
    {{- m.content or '' }}{{ '<|tool_calls_section_begin|>' }}
    {%- for call in m.tool_calls %}
      {{- '<|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>' }}
      {%- if call.function.arguments is string %}{{ call.function.arguments }}
      {%- else %}{{ call.function.arguments | tojson }}{% endif %}{{ '<|tool_call_end|>' }}
    {%- endfor %}{{ '<|tool_calls_section_end|>' }}
  {%- elif m.role == 'tool' %}{{ '## Return of ' + m.tool_call_id + '\n' + m.content }}
  {%- else %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}"""

KIMI_K2_THINKING = (  # reasoning is kept behind the last answer only
    "{%- set ns = namespace(last=-1) %}{% for m in messages %}"
    "{% if m.role == 'assistant' and not m.tool_calls %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
) + KIMI_K2.replace(
    "{{ '<|im_assistant|>assistant<|im_middle|>' }}\n  {%- else",
    "{{ '<|im_assistant|>assistant<|im_middle|><think>' }}"
    "{% if loop.index0 > ns.last and m.reasoning_content %}{{ m.reasoning_content }}{% endif %}"
    "{{ '</think>' }}\n  {%- else",
)

MINIMAX_M2 = """
{%- set ns = namespace(user=-1) %}
{%- for m in messages if m.role == 'user' %}{% set ns.user = messages.index(m) %}{% endfor %}
{{- ']~!b[' }}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {{- ']~b]ai\n' }}
    {%- if m.reasoning_content and loop.index0 > ns.user %}
      {{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}
    {%- endif %}
    {{- m.content }}
    {%- if m.tool_calls %}
      {{- '\n<minimax:tool_call>\n' }}
      {%- for call in m.tool_calls %}
        {{- '<invoke name="' + call.function.name + '">' }}
        {%- for key, value in call.function.arguments.items() %}
          {{- '\n<parameter name="' + key + '">' + (value if value is string else value | tojson) }}
          {{- '</parameter>' }}
        {%- endfor %}{{ '\n</invoke>\n' }}
      {%- endfor %}{{ '</minimax:tool_call>' }}
    {%- endif %}{{ '[e~[\n' }}
  {%- elif m.role == 'tool' %}{{ ']~b]tool\n<response>' + m.content + '</response>[e~[\n' }}
  {%- else %}{{ ']~b]' + m.role + '\n' + m.content + '[e~[\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ ']~b]ai\n<think>\n' }}{% endif %}"""

DEEPSEEK_TOKENS = (
    "<｜end▁of▁sentence｜> <｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜> "
    "<｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> "
    "<｜tool▁sep｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> "
    "<｜tool▁output▁end｜>"
)
KIMI_TOKENS = (
    "<|im_end|> [BOS] <|im_user|> <|im_assistant|> <|im_system|> <|im_middle|> "
    "<|tool_calls_section_begin|> <|tool_calls_section_end|> <|tool_call_begin|> "
    "<|tool_call_argument_begin|> <|tool_call_end|>"
)
# The template, and the special tokens: end of sequence first, begin of sequence second.
FAMILIES = {
    "chatml": (CHATML, "<|im_end|> <|endoftext|> <|im_start|>"),
    "qwen3": (QWEN3, "<|im_end|> <|endoftext|> <|im_start|>"),
    "llama3": (
        LLAMA3,
        "<|eot_id|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|>",
    ),
    "harmony": (
        HARMONY,
        "<|return|> <|startoftext|> <|start|> <|message|> <|channel|> <|end|> <|call|>",
    ),
    "deepseek v3": (DEEPSEEK_V3, DEEPSEEK_TOKENS),
    "deepseek r1": (DEEPSEEK_R1, DEEPSEEK_TOKENS),
    "deepseek v3.1": (DEEPSEEK_V31, DEEPSEEK_TOKENS),
    "kimi k2": (KIMI_K2, KIMI_TOKENS),
    "kimi k2 thinking": (KIMI_K2_THINKING, KIMI_TOKENS),
    "minimax m2": (MINIMAX_M2, "[e~[ ]~!b[ ]~b]"),
}
