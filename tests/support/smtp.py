"""A real SMTP server for the tests, which fails where its script says so.

    target/test-venv/bin/python tests/support/smtp.py --script 451,ok,drop-after-data

It prints one JSON line when it serves, {"port", "ca", "maildir"}, and then one a happening:
{"event": "transaction", "n", "answer", "message_id", "stored"} for each entry of the script that
was played, and {"event": "reply", "answer"} for each refusal that the script did not ask for, such
as a wrong password. It ends, and removes its temporary directory, at the end of its standard
input. A line on the input is a new script, in place of what is left of the old one.

The script is a list, comma-separated or one a line in a file, with an entry for each transaction;
after it all is well. An entry that its connection did not come to serves the next one.

    ok                  the message is stored and answered with 250
    451, 552 too big    a reply instead, at the end of DATA
    PHASE:451           the same at greet, ehlo, starttls, auth, mail, rcpt or data (the command)
    never-greet         the connection is accepted, and nothing is ever said
    drop-before-data    the line is cut when DATA is issued
    drop-in-data        … after the 354, while the client sends
    drop-after-data     … when the message was stored, in place of the 250
    hang-after-data     the message is stored, and nothing is ever said again
    451*3, ok*2         an entry, so many times

A 421, wherever it stands, closes the connection, as RFC 5321 has it.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import email.parser
import email.policy
import json
import logging
import os
import pathlib
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings

from aiosmtpd.smtp import MISSING, SMTP, AuthResult, TLSSetupException

PHASES = ("greet", "ehlo", "starttls", "auth", "mail", "rcpt", "data", "end")
# Behaviours that are no reply, and the phase in which each takes its turn.
ACTIONS = {
    "ok": "end",
    "never-greet": "greet",
    "drop-before-data": "data",
    "drop-in-data": "data",
    "drop-after-data": "end",
    "hang-after-data": "end",
}
# What a real server would say: clients log it, and tests look for it there.
TEXTS = {
    "421": "4.3.2 Service not available, closing transmission channel",
    "450": "4.2.0 Mailbox busy, try again later",
    "451": "4.3.0 Local error in processing, try again later",
    "452": "4.3.1 Insufficient system storage",
    "454": "4.7.0 Temporary authentication failure",
    "530": "5.7.0 Authentication required",
    "535": "5.7.8 Authentication credentials invalid",
    "550": "5.1.1 No such mailbox",
    "552": "5.3.4 Message size exceeds fixed limit",
    "554": "5.7.1 Transaction failed",
}


def report(**fields):
    print(json.dumps(fields), flush=True)


@dataclasses.dataclass
class Entry:
    phase: str
    answer: str  # a behaviour's name or the code of a reply
    text: str = ""
    played: bool = False

    @property
    def reply(self):
        return f"{self.answer} {self.text}"

    @classmethod
    def parse(cls, word):
        if word in ACTIONS:
            return cls(ACTIONS[word], word)
        found = re.fullmatch(r"(?:([a-z]+):)?([45]\d\d)(?:\s+(.*))?", word)
        if not found or (found[1] or "end") not in PHASES:
            raise ValueError(
                f"{word!r} is not a behaviour; known: {' '.join(ACTIONS)}, 4xx, 5xx, PHASE:4xx "
                f"with one of the phases {' '.join(PHASES)}"
            )
        return cls(found[1] or "end", found[2], found[3] or TEXTS.get(found[2], "As scripted"))


class Script:
    """The entries still to be played, and the count of those that were."""

    def __init__(self, source):
        self.count = 0
        self.replace(source)

    def replace(self, source):
        entries = collections.deque()
        for word in filter(None, map(str.strip, re.split(r"[,\n]", source))):
            times = re.fullmatch(r"(.*?)\s*\*\s*(\d+)", word)
            word, number = (times[1], int(times[2])) if times else (word, 1)
            entries.extend(Entry.parse(word) for _ in range(number))
        self.entries = entries

    def take(self, at_greeting):
        # On a connection that was greeted already, `never-greet` waits for the next connection.
        if not self.entries or (self.entries[0].phase == "greet" and not at_greeting):
            return Entry.parse("ok")
        return self.entries.popleft()

    def give_back(self, entry):
        self.entries.appendleft(entry)

    def play(self, entry, message_id=None, stored=None):
        entry.played = True
        self.count += 1
        answer = "250" if entry.answer == "ok" else entry.answer
        report(
            event="transaction",
            n=self.count,
            answer=answer,
            phase=entry.phase,
            message_id=message_id,
            stored=stored,
        )


class Maildir:
    """Accepted messages as NNNN.eml, each with its envelope in NNNN.json."""

    def __init__(self, path):
        self.path = pathlib.Path(path).resolve()
        self.path.mkdir(parents=True, exist_ok=True)
        # Goes on where a server before this one ended.
        self.count = max((int(p.stem) for p in self.path.glob("[0-9]*.eml")), default=0)

    def store(self, content, envelope):
        self.count += 1
        name = f"{self.count:04}"
        self.path.joinpath(f"{name}.eml").write_bytes(content)
        # By a rename, and last: a test that sees the .json finds both of them whole.
        draft = self.path / f".{name}.json"
        draft.write_text(json.dumps(envelope) + "\n")
        draft.rename(self.path / f"{name}.json")
        return name


class Connection(SMTP):
    """One client's connection, with the entry that its transaction plays."""

    def __init__(self, script, maildir, password, implicit_tls, **options):
        self.script = script
        self.maildir = maildir
        self.with_auth = password is not None
        self.implicit_tls = implicit_tls
        self.entry = None
        self.greeted = False
        super().__init__(
            self,
            auth_required=self.with_auth,
            # Like real servers: no password over a line that could be, and is not, encrypted.
            auth_require_tls=options.get("tls_context") is not None,
            authenticator=lambda _server, _session, _envelope, _mechanism, given: AuthResult(
                success=(given.login.decode(), given.password.decode()) == password,
                # Not handled: the refusal is left to the base class.
                handled=False,
                auth_data=given,
            ),
            enable_SMTPUTF8=True,
            # Silence is for the script to decide.
            timeout=24 * 60 * 60,
            hostname="localhost",
            **options,
        )

    def playing(self, phase):
        """The entry, if its turn is this phase. It stays so for a second RCPT or AUTH."""
        if self.entry.phase != phase or self.entry.answer == "ok":
            return None
        if not self.entry.played:
            self.script.play(self.entry)
        return self.entry

    def cut(self):
        self.transport.abort()
        # The base class ends a connection by cancelling its task, and so does this.
        raise asyncio.CancelledError

    async def push(self, status):
        text = status.decode() if isinstance(status, bytes) else status
        if text[0] in "45" and not (self.entry.played and text == self.entry.reply):
            report(event="reply", answer=text[:3], text=text[4:])
        await super().push(status)
        if text.startswith("421"):
            self.transport.close()
            raise asyncio.CancelledError

    def connection_made(self, transport):
        super().connection_made(transport)
        if self.implicit_tls:
            # The base class knows STARTTLS only.
            self.session.ssl = {"ssl_object": transport.get_extra_info("ssl_object")}

    def give_back(self):
        if self.entry and not self.entry.played:
            self.script.give_back(self.entry)
        self.entry = Entry.parse("ok")
        self.entry.played = True

    async def handle_QUIT(self, _server, _session, _envelope):
        # Before the answer, so that the client's next connection finds it.
        self.give_back()
        return MISSING

    def connection_lost(self, error):
        self.give_back()
        super().connection_lost(error)

    async def handle_exception(self, error):
        # The base class would ask its handler, which is this object, for ever.
        if not isinstance(error, TLSSetupException):  # a client that distrusts us may hang up
            traceback.print_exception(error)
        return f"451 4.3.0 the test server failed: {error!r}"

    async def _handle_client(self):
        self.entry = self.script.take(at_greeting=True)
        refusal = self.playing("greet")
        if refusal and refusal.answer == "never-greet":
            try:
                await asyncio.Future()  # until the client goes
            finally:
                if self.transport:
                    self.transport.close()
        elif refusal:
            await self.push(refusal.reply)
            self.transport.close()
        else:
            await super()._handle_client()

    async def handle_EHLO(self, _server, session, _envelope, hostname, responses):
        refusal = self.playing("ehlo")
        if refusal:
            return [refusal.reply]
        session.host_name = hostname
        # The base class offers AUTH even where nobody has a password.
        return [r for r in responses if self.with_auth or not r.startswith("250-AUTH")]

    async def smtp_STARTTLS(self, arg):
        refusal = self.playing("starttls")
        if refusal:
            await self.push(refusal.reply)
        else:
            await super().smtp_STARTTLS(arg)

    async def handle_AUTH(self, _server, _session, _envelope, _args):
        refusal = self.playing("auth")
        return refusal.reply if refusal else MISSING

    async def handle_MAIL(self, _server, _session, _envelope, _address, _options):
        if self.entry.played:
            self.entry = self.script.take(at_greeting=False)
        refusal = self.playing("mail")
        return refusal.reply if refusal else MISSING

    async def handle_RCPT(self, _server, _session, _envelope, _address, _options):
        refusal = self.playing("rcpt")
        return refusal.reply if refusal else MISSING

    async def smtp_DATA(self, arg):
        refusal = self.envelope.rcpt_tos and self.playing("data")
        if not refusal:
            await super().smtp_DATA(arg)
        elif refusal.answer == "drop-before-data":
            self.cut()
        elif refusal.answer == "drop-in-data":
            await self.push("354 End data with <CR><LF>.<CR><LF>")
            await self._reader.readline()
            self.cut()
        else:
            await self.push(refusal.reply)

    async def handle_DATA(self, _server, session, envelope):
        entry = self.entry
        content = envelope.original_content
        parser = email.parser.BytesHeaderParser(policy=email.policy.compat32)
        message_id = parser.parsebytes(content)["Message-ID"]
        if entry.phase != "end":
            # Such as `auth:535` where the client never authenticated: it waits for one that does.
            self.give_back()
            entry = self.entry
        if entry.answer not in ACTIONS:
            self.script.play(entry, message_id)
            return entry.reply
        stored = self.maildir.store(
            content,
            {
                "mail_from": envelope.mail_from,
                "rcpt_tos": envelope.rcpt_tos,
                "tls": session.ssl is not None,
                "user": session.auth_data.login.decode() if session.auth_data else None,
            },
        )
        self.script.play(entry, message_id, stored)
        if entry.answer == "drop-after-data":
            self.cut()
        if entry.answer == "hang-after-data":
            await asyncio.Future()
        return f"250 2.0.0 Ok: stored as {stored}"


def make_certificate(directory):
    """A CA and a certificate for localhost signed by it.

    Two of them, because rustls refuses a self-signed CA certificate as a server's own.
    """

    def openssl(*arguments):
        subprocess.run(
            ["openssl", *arguments], cwd=directory, check=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2",
        "-subj", "/CN=SMTP test CA", "-addext", "keyUsage=critical,keyCertSign",
    )
    openssl("req", *key, "-keyout", "key.pem", "-out", "server.csr", "-subj", "/CN=localhost")
    pathlib.Path(directory, "extensions").write_text(
        "basicConstraints=critical,CA:FALSE\nextendedKeyUsage=serverAuth\n"
        "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1\n"
    )
    openssl(
        "x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
        "-CAcreateserial", "-extfile", "extensions", "-days", "2", "-out", "cert.pem",
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pathlib.Path(directory, "cert.pem"), pathlib.Path(directory, "key.pem"))
    return context, os.path.join(directory, "ca.pem")


def follow_input(on_line, on_end):
    """Calls back for each line and at the end of the standard input, from a thread: the event
    loop can only watch pipes, and a test may give a file or /dev/null."""

    def read():
        for line in sys.stdin:
            on_line(line)
        on_end()

    threading.Thread(target=read, daemon=True).start()


def quiet(_loop, context):
    # Clients that go without a word are what these tests are about.
    if not isinstance(context.get("exception"), ConnectionError):
        print(f"smtp.py: {context['message']}: {context.get('exception')!r}", file=sys.stderr)


async def serve(arguments, script, directory):
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(quiet)
    maildir = Maildir(arguments.maildir or os.path.join(directory, "mail"))
    context, ca = None, None
    if arguments.starttls or arguments.tls:
        context, ca = make_certificate(directory)

    def connect():
        return Connection(
            script,
            maildir,
            password=(arguments.user, arguments.password) if arguments.user else None,
            implicit_tls=arguments.tls,
            tls_context=context if arguments.starttls else None,
            data_size_limit=arguments.size,
            loop=loop,
        )

    server = await loop.create_server(
        connect, "127.0.0.1", arguments.port, ssl=context if arguments.tls else None
    )
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)

    def replace(line):
        try:
            script.replace(line)
            report(event="script", left=len(script.entries))
        except ValueError as error:
            report(event="script", error=str(error))

    # The loop is closed already when the end comes after a signal.
    def in_loop(call, *values):
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(call, *values)

    follow_input(lambda line: in_loop(replace, line), lambda: in_loop(ended.set))
    report(port=server.sockets[0].getsockname()[1], ca=ca, maildir=str(maildir.path))
    await ended.wait()
    server.close()


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    tls = parser.add_mutually_exclusive_group()
    tls.add_argument("--starttls", action="store_true", help="offer STARTTLS")
    tls.add_argument("--tls", action="store_true", help="TLS from the first byte")
    parser.add_argument("--user", help="whoever sends must be this user")
    parser.add_argument("--password", help="and have this password")
    parser.add_argument("--script", default="", metavar="LIST|FILE", help="see above")
    parser.add_argument("--size", type=int, metavar="BYTES", help="announce SIZE, and keep to it")
    parser.add_argument("--maildir", metavar="DIR", help="default: a temporary one")
    arguments = parser.parse_args()
    if (arguments.user is None) != (arguments.password is None):
        parser.error("--user and --password go together")
    source = arguments.script
    if os.path.isfile(source):
        source = pathlib.Path(source).read_text()
    try:
        script = Script(source)
    except ValueError as error:
        parser.error(f"--script: {error}")
    return arguments, script


def main():
    arguments, script = parse_arguments()
    # That a password may travel in clear is what some tests want.
    warnings.filterwarnings("ignore", message="Requiring AUTH")
    logging.getLogger("mail.log").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="timelined-smtp.") as directory:
        # The reader of the reports may be gone before us.
        with contextlib.suppress(BrokenPipeError):
            asyncio.run(serve(arguments, script, directory))
    # Not by way of the interpreter's end, which would wait for the thread that reads the input.
    os._exit(0)


if __name__ == "__main__":
    main()
