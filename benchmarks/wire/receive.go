package main

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strings"
	"syscall"
)

// A receiver of deliveries: each must be signed as Standard Webhooks says, with the one secret.
type receiver struct {
	poll         *poller
	came         map[int][]byte
	key          []byte
	ids          map[string]bool
	right, wrong int
	buffer       []byte
}

func receive(port int, secret string) {
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(secret, "whsec_"))
	must(err)
	r := &receiver{poll: newPoller(), came: map[int][]byte{}, key: key, ids: map[string]bool{}, buffer: make([]byte, mostRead)}
	listener := listen(port)
	r.poll.watch(syscall.EPOLL_CTL_ADD, listener, syscall.EPOLLIN)
	for {
		for _, event := range r.poll.wait(-1) {
			if fd := int(event.Fd); fd == listener {
				if made := accept(listener); made >= 0 {
					r.came[made] = nil
					r.poll.watch(syscall.EPOLL_CTL_ADD, made, syscall.EPOLLIN)
				}
			} else if !r.turn(fd) {
				delete(r.came, fd)
				syscall.Close(fd)
			}
		}
	}
}

// turn takes what came; false: the client is gone.
func (r *receiver) turn(fd int) bool {
	count, err := syscall.Read(fd, r.buffer)
	if err != nil {
		return blocked(err)
	}
	if count == 0 {
		return false
	}
	came := append(r.came[fd], r.buffer[:count]...)
	for {
		end := bytes.Index(came, []byte("\r\n\r\n"))
		if end < 0 || len(came) < end+4+lengthOf(came[:end+2]) {
			r.came[fd] = came
			return true
		}
		head := came[:end+2]
		whole := end + 4 + lengthOf(head)
		if _, err := syscall.Write(fd, r.answer(head, came[end+4:whole])); err != nil {
			return false
		}
		came = append(came[:0], came[whole:]...)
	}
}

func (r *receiver) answer(head, body []byte) []byte {
	if bytes.HasPrefix(head, []byte("GET ")) {
		return answerOf(fmt.Sprintf(`{"right":%d,"wrong":%d,"events":%d}`, r.right, r.wrong, len(r.ids)))
	}
	id, _ := field(head, "webhook-id")
	if r.signed(head, id, body) {
		r.right++
		r.ids[string(id)] = true
	} else {
		r.wrong++
	}
	return []byte("HTTP/1.1 204 No Content\r\n\r\n")
}

func (r *receiver) signed(head, id, body []byte) bool {
	at, times := field(head, "webhook-timestamp")
	given, signatures := field(head, "webhook-signature")
	if times != 1 || signatures != 1 || len(id) == 0 {
		return false
	}
	mac := hmac.New(sha256.New, r.key)
	mac.Write(id)
	mac.Write([]byte("."))
	mac.Write(at)
	mac.Write([]byte("."))
	mac.Write(body)
	return string(given) == "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil))
}
