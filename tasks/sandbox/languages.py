"""The languages of the sandbox, and where their toolchains are on this machine."""
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """How a program of one language is put together, checked and run."""

    file: str  # the program's name; it holds before + code + between + tests + after
    check: str  # parses or compiles the program
    run: str
    install: str  # Debian's command; other systems have similar names
    before: str = ""
    between: str = "\n"
    after: str = ""  # prints KEY_A, then KEY_B, in two pieces: printing this text is no pass
    main: str = "$^"  # pattern of a main() that `after` replaces by its own and calls ...
    renamed_main: str = ""  # ... by this name
    rewrite_tests: Callable[[str], str] = str  # the default leaves them as they are
    check_seconds: float = 10.0  # added to the time limit for the check
    # Runtimes that reserve gigabytes of addresses get RLIMIT_DATA, which counts writable memory.
    memory_limit: str = "RLIMIT_DATA"
    forks: bool = False  # whether the program may start processes

    def program(self, code: str, tests: str, key_a: str, key_b: str) -> str:
        """Return the text of the whole program, which prints both keys if it reaches its end."""
        text = self.before + code + self.between + self.rewrite_tests(tests)
        text = re.sub(self.main, self.renamed_main, text)
        return text + self.after.replace("KEY_A", key_a).replace("KEY_B", key_b)


# Lines of bash whose failure `set -e` ignores: "! ..." and lists that end in a test or a message.
BASH_EXEMPT = re.compile(
    r"^\s*!\s|[&|]\s*(?:[!\[{]|\(\(|(?:test|true|echo|printf|grep|diff|cmp)\b)[^&|]*$")
# Lines with another meaning: "[ a ] && exit 1", comments, and lines that the next one continues.
BASH_OTHER = re.compile(r"\bexit\b|^\s*#|(?:\b(?:then|do)|;;|[{(\\|&])\s*$")
HERE_DOCUMENT = re.compile(r"(?<!<)<<-?\s*['\"\\]?([A-Za-z_]\w*)")


def check_lists(tests: str) -> str:
    """Return bash tests in which `[ a ] && echo ok` and `! [ a ]` end the program if they fail."""
    joined = re.sub(r"\\\n[ \t]*(?=&&)|(?<=&&)[ \t]*\n[ \t]*", " ", tests)
    old_lines = joined.split("\n")
    lines = []
    document_end = None  # the word that ends a here-document, whose lines are no statements
    for i, line in enumerate(old_lines):
        lines.append(line)
        if document_end is None:
            statement = line
            opening = HERE_DOCUMENT.search(line)
            if opening and opening[1] in map(str.strip, old_lines[i:]):
                document_end = opening[1]
        elif line.strip() == document_end:
            document_end = None
        is_whole = document_end is None
        if is_whole and BASH_EXEMPT.search(statement) and not BASH_OTHER.search(statement):
            lines.append("[ $? = 0 ]")
    if any(line.lstrip().startswith("! ") for line in lines):  # a missing function satisfies none
        lines.insert(0, "command_not_found_handle() { : > .not_found; return 127; }")
        lines.append("[[ ! -e .not_found ]]")
    return "\n".join(lines)


# The code may have turned assert into a macro that does nothing, or main into another name.
C_BETWEEN = "\n#undef NDEBUG\n#undef main\n#include <assert.h>\n"
# With --wrap=main the linker starts our __wrap_main in place of main. The keys in the names are
# there because no macro of the code can replace a name that it does not know.
C_AFTER = """
int wrap_KEY_A(int n, char **v) __asm__("__wrap_main");
int wrap_KEY_A(int n, char **v) {
    int status = ((int (*)(int, char **)) main)(n, v);
    if (!status) __builtin_printf("%s%s\\n", "KEY_A", "KEY_B");
    return status;
}
"""
JS_BEFORE = """const $JSON = Object.freeze(JSON), $console = console;
for (const c of [Object, Array, Number, String, Boolean])
    Object.defineProperty(c.prototype, 'toJSON', {value: undefined});
"""
# console.assert only prints a message. In the block of the tests it throws an error.
JS_BETWEEN = """
;{ const JSON = $JSON, console = {...$console, assert(...a) {
    if (!a[0]) throw Error('assertion failed ' + a.slice(1)); }};
"""
JS_AFTER = "\n}\nprocess.stdout.write('KEY_A'); process.stdout.write('KEY_B\\n');\n"
TS_BEFORE = "declare const process: any, require: any, module: any;\n" + JS_BEFORE
TS_BETWEEN = JS_BETWEEN.replace("(...a)", "(...a: any[])")
JVM = "-Xss8m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData"
JAVA_AFTER = """
class Harness {
    public static void main(String[] a) throws Throwable {
        Main.main(a);
        System.out.print("KEY_A");
        System.out.println("KEY_B");
    }
}
"""
# The constant takes an attribute that the code ends with, such as #[cfg(test)].
RUST_BETWEEN = "\nconst _: () = ();\n" + "".join(
    f"macro_rules! {name} {{ ($($t:tt)*) => {{ ::std::{name}!($($t)*) }} }}\n"
    for name in ("assert", "assert_eq", "assert_ne", "panic", "format", "print"))
RUST_AFTER = """
fn main() {
    let status = std::process::Termination::report(tested_main());
    if format!("{status:?}") == format!("{:?}", std::process::ExitCode::SUCCESS) {
        for text in ["KEY_A", "KEY_B", "\\n"] { print!("{}", text) }
    }
}
"""
BASH_BEFORE = "readonly SANDBOX_PATH=$PATH\n"
# Assignments call nothing. With POSIXLY_CORRECT bash finds `unset` before a function `unset`.
BASH_BETWEEN = """
PATH=$SANDBOX_PATH
POSIXLY_CORRECT=1
\\unset -f [ test printf echo set builtin command unalias true false let return eval grep || exit 1
\\unalias -a
\\unset POSIXLY_CORRECT
trap - EXIT ERR DEBUG; set -e
"""
# f may have called `set +e`; no code can replace the keyword [[.
BASH_AFTER = "\n[[ $- == *e* ]] && printf '%s%s\\n' KEY_A KEY_B\n"
# The tests are not parsed yet. Subs of these names in this package or in all would replace die.
# The inner BEGIN is `no strict 'refs'`, which would load a file.
PERL_BETWEEN = """
;
BEGIN { BEGIN { $^H &= ~2 } delete @{__PACKAGE__ . '::'}{qw(die exit eval)};
    delete @CORE::GLOBAL::{qw(die exit eval)}; }
"""
PHP_BETWEEN = """
?><?php ini_set('zend.assertions', '1'); ini_set('assert.exception', '1');
"""

LANGUAGES = {
    "python": Language(  # child.py compiles and runs it
        "main.py", check="", run="", install="", check_seconds=0, memory_limit="RLIMIT_AS"),
    "javascript": Language(
        "main.js", check="node --check main.js", run="node main.js",
        install="apt-get install nodejs", before=JS_BEFORE, between=JS_BETWEEN, after=JS_AFTER),
    "typescript": Language(
        "main.ts", check="tsc --target es2022 --module commonjs --noEmitOnError main.ts",
        run="node main.js", install="apt-get install nodejs npm && npm install -g typescript",
        before=TS_BEFORE, between=TS_BETWEEN, after=JS_AFTER, check_seconds=20),
    "c": Language(
        "main.c", check="cc -O1 -w -o main main.c -lm -Wl,--wrap=main", run="./main",
        install="apt-get install gcc libc6-dev", between=C_BETWEEN, after=C_AFTER,
        memory_limit="RLIMIT_AS"),
    "c++": Language(
        "main.cc", check="c++ -O1 -w -o main main.cc -Wl,--wrap=main", run="./main",
        install="apt-get install g++", between=C_BETWEEN, after=C_AFTER, memory_limit="RLIMIT_AS"),
    "java": Language(
        "Main.java", check=f"javac {JVM.replace('-X', '-J-X')} -nowarn Main.java",
        run=f"java {JVM} -Xmx256m -ea -cp . Harness",
        install="apt-get install default-jdk-headless", after=JAVA_AFTER),
    "rust": Language(
        "main.rs", check="rustc --edition 2021 -A warnings -C debuginfo=0 -o main main.rs",
        run="./main", install="apt-get install rustc", between=RUST_BETWEEN, after=RUST_AFTER,
        main=r"\bfn\s+main\s*\(\s*\)", renamed_main="fn tested_main()"),
    "go": Language(
        "main.go", check="go build -o main main.go", run="./main",
        install="apt-get install golang-go", check_seconds=60,
        after='\nfunc main() { testedMain(); print("KEY_A", "KEY_B", "\\n") }\n',
        main=r"\bfunc\s+main\s*\(\s*\)", renamed_main="func testedMain()"),
    "bash": Language(
        "main.sh", check="bash -n main.sh", run="bash main.sh", install="apt-get install bash",
        before=BASH_BEFORE, between=BASH_BETWEEN, after=BASH_AFTER, rewrite_tests=check_lists,
        memory_limit="RLIMIT_AS", forks=True),
    "perl": Language(
        "main.pl", check="perl -c main.pl", run="perl main.pl", install="apt-get install perl",
        between=PERL_BETWEEN, after="\n;print STDOUT 'KEY_A', 'KEY_B', \"\\n\";\n",
        memory_limit="RLIMIT_AS"),
    "ruby": Language(
        "main.rb", check="ruby -c main.rb", run="ruby main.rb", install="apt-get install ruby",
        after='\nSTDOUT.write("KEY_A", "KEY_B", "\\n")\n'),
    "php": Language(
        "main.php", check="php -n -l main.php", run="php -n main.php",
        install="apt-get install php-cli", between=PHP_BETWEEN, memory_limit="RLIMIT_AS",
        after="\n;fwrite(STDOUT, 'KEY_A'); fwrite(STDOUT, \"KEY_B\\n\");\n"),
    "lua": Language(
        "main.lua", check="lua -e assert(loadfile('main.lua'))", run="lua main.lua",
        install="apt-get install lua5.4", between="\n;\n", memory_limit="RLIMIT_AS",
        after="\nio.stdout:write('KEY_A', 'KEY_B', '\\n')\n"),
}

# Per language a function that squares its argument, and tests that it passes.
C_TESTS = "int main() { assert(f(3) == 9); }"
SAMPLES = {
    "python": ("def f(x):\n    return x * x", "assert f(3) == 9"),
    "javascript": ("const f = x => x * x", "console.assert(f(3) === 9)"),
    "typescript": ("const f = (x: number): number => x * x", "console.assert(f(3) === 9)"),
    "c": ("int f(int x) { return x * x; }", C_TESTS),
    "c++": ("auto f(int x) { return x * x; }", C_TESTS),
    "java": ("class Solution { int f(int x) { return x * x; } }",
             "public class Main { public static void main(String[] a) { "
             "if (new Solution().f(3) != 9) throw new Error(); } }"),
    "rust": ("fn f(x: i32) -> i32 { x * x }", "fn main() { assert_eq!(f(3), 9); }"),
    "go": ("package main\nfunc f(x int) int { return x * x }",
           "func main() { if f(3) != 9 { panic(f(3)) } }"),
    "bash": ("f() { echo $(($1 * $1)); }", "[ $(f 3) = 9 ]"),
    "perl": ("sub f { $_[0] * $_[0] }", "die unless f(3) == 9;"),
    "ruby": ("def f(x) = x * x", "raise unless f(3) == 9"),
    "php": ("<?php function f($x) { return $x * $x; }", "assert(f(3) === 9);"),
    "lua": ("function f(x) return x * x end", "assert(f(3) == 9)"),
}


@functools.lru_cache(None)
def find_program(name: str) -> str | None:
    """Return the absolute path of a program on PATH."""
    path = shutil.which(name)
    if path and name == "rustc":
        # It may be rustup's proxy, which needs files of its user; the compiler itself does not.
        sysroot = subprocess.run([path, "--print", "sysroot"], capture_output=True, text=True)
        path = shutil.which(os.path.join(sysroot.stdout.strip(), "bin", name))
    return os.path.abspath(path) if path else None


@functools.lru_cache(None)
def find_commands(language: str) -> list[list[str]] | None:
    """Return the argument lists of the check and of the run, or None if a program is missing."""
    row = LANGUAGES[language]
    commands = [row.check.split(), row.run.split()]
    for words in commands:
        if words and not words[0].startswith("./"):
            words[0] = find_program(words[0])
            if words[0] is None:
                return None
    return commands
