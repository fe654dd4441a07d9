package main

import (
	"bytes"
	"fmt"
	"strings"
	"syscall"
)

// A client of the API: what came and was not understood yet, and what is still owed either way.
type client struct {
	fd      int
	came    []byte
	answer  []byte // to be sent
	toSend  int    // bytes of a download after it
	sent    int
	toTake  int // bytes of an upload
	taken   int
	writing bool // epoll tells when more can be written
}

type api struct {
	poll         *poller
	clients      map[int]*client
	buffer       []byte
	right, wrong int
	json         []byte
}

func serve(port int) {
	listener := listen(port)
	a := &api{poll: newPoller(), clients: map[int]*client{}, buffer: make([]byte, mostRead), json: answerOf(jsonBody())}
	a.poll.watch(syscall.EPOLL_CTL_ADD, listener, syscall.EPOLLIN)
	for {
		for _, event := range a.poll.wait(-1) {
			if int(event.Fd) == listener {
				a.accept(listener)
			} else if one := a.clients[int(event.Fd)]; one != nil && !a.turn(one) {
				delete(a.clients, one.fd)
				syscall.Close(one.fd)
			}
		}
	}
}

func jsonBody() string {
	before, after := `{"id":4711,"name":"an answer of an API","items":["`, `"]}`
	return before + strings.Repeat("0123456789abcdef", jsonBytes/16)[:jsonBytes-len(before)-len(after)] + after
}

func answerOf(body string) []byte {
	return []byte(fmt.Sprintf("HTTP/1.1 200 OK\r\nServer: wire\r\nDate: Sat, 21 Nov 2026 12:00:00 GMT\r\n"+
		"Content-Type: application/json; charset=utf-8\r\nCache-Control: no-store\r\nETag: \"0123456789\"\r\n"+
		"X-Request-Id: 8d3c1a34-5d1e-4c57-9b6e-2a1f6f6f7a10\r\nContent-Length: %d\r\n\r\n%s", len(body), body))
}

func (a *api) accept(listener int) {
	fd := accept(listener)
	if fd < 0 {
		return
	}
	a.clients[fd] = &client{fd: fd}
	a.poll.watch(syscall.EPOLL_CTL_ADD, fd, syscall.EPOLLIN)
}

// turn does what can be done for a client; false: it is gone.
func (a *api) turn(one *client) bool {
	if one.writing {
		return a.write(one)
	}
	count, err := syscall.Read(one.fd, a.buffer)
	if err != nil {
		return blocked(err)
	}
	if count == 0 {
		return false
	}
	came := a.buffer[:count]
	if one.toTake > 0 {
		came = a.take(one, came)
	}
	if len(came) > 0 {
		one.came = append(one.came, came...)
	}
	return a.understand(one)
}

// understand answers every whole request that has come; the last one may still have a body under way.
func (a *api) understand(one *client) bool {
	for !one.writing && one.toTake == 0 {
		end := bytes.Index(one.came, []byte("\r\n\r\n"))
		if end < 0 {
			break
		}
		head := one.came[:end+2]
		a.begin(one, head)
		rest := one.came[end+4:]
		if one.toTake > 0 && len(rest) > 0 {
			rest = a.take(one, rest)
		}
		one.came = append(one.came[:0], rest...)
		if !a.write(one) {
			return false
		}
	}
	return true
}

// begin decides on a request.
func (a *api) begin(one *client, head []byte) {
	target := string(bytes.Fields(head)[1])
	path, _, _ := strings.Cut(target, "?")
	if path == "/counters" {
		one.answer = answerOf(fmt.Sprintf(`{"right":%d,"wrong":%d}`, a.right, a.wrong))
		return
	}
	a.judge(head, path[strings.LastIndexByte(path, '/')+1:])
	switch {
	case strings.HasPrefix(path, "/json/"):
		one.answer = a.json
	case strings.HasPrefix(path, "/down/"):
		fmt.Sscanf(path, "/down/%d/", &one.toSend)
		one.sent = 0
		one.answer = []byte(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n",
			one.toSend))
	case strings.HasPrefix(path, "/up/"):
		one.toTake, one.taken, one.answer = lengthOf(head), 0, nil
	default:
		one.answer = []byte("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
	}
}

// judge counts whether a request has exactly the credential of what it asks for, and nothing of the caller's.
func (a *api) judge(head []byte, name string) {
	value, count := field(head, "authorization")
	given, found := bytes.CutPrefix(value, []byte(credentialBefore))
	if count == 1 && found && string(given) == name && !bytes.Contains(head, []byte(callerKeyBegins)) {
		a.right++
	} else {
		a.wrong++
	}
}

// take counts and checks a piece of an upload, answers at its end, and returns what came behind it.
func (a *api) take(one *client, came []byte) []byte {
	piece := came[:min(len(came), one.toTake)]
	if !isPattern(piece, one.taken) {
		a.wrong++
	}
	one.toTake -= len(piece)
	one.taken += len(piece)
	if one.toTake == 0 {
		one.answer = answerOf(fmt.Sprintf(`{"bytes":%d}`, one.taken))
		a.write(one)
	}
	return came[len(piece):]
}

// write sends what is owed as far as that goes; false: the client is gone.
func (a *api) write(one *client) bool {
	for len(one.answer) > 0 || one.toSend > 0 {
		data := one.answer
		if len(data) == 0 {
			data = patternAt(one.sent, one.toSend)
		}
		count, err := syscall.Write(one.fd, data)
		if err != nil && !blocked(err) {
			return false
		}
		if err != nil {
			a.wake(one, true)
			return true
		}
		if len(one.answer) > 0 {
			one.answer = one.answer[count:]
		} else {
			one.sent += count
			one.toSend -= count
		}
	}
	a.wake(one, false)
	return true
}

// wake has epoll tell when more can be written, or when more came.
func (a *api) wake(one *client, writing bool) {
	if one.writing == writing {
		return
	}
	one.writing = writing
	events := uint32(syscall.EPOLLIN)
	if writing {
		events = syscall.EPOLLOUT
	}
	a.poll.watch(syscall.EPOLL_CTL_MOD, one.fd, events)
}
