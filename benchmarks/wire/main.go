// Wire is the far side and the near side of the benchmarks: an API that checks its credential, a receiver of webhooks
// that checks its signatures, and the load.
//
//	wire upstream PORT                                      serve until killed
//	wire closed PORT REQUESTS CONNECTIONS SECONDS           each connection asks again once it was answered
//	wire open PORT REQUESTS CONNECTIONS SECONDS PER_SECOND  requests arrive by chance, however long answers take
//	wire down PORT REQUESTS BYTES AT_ONCE                   download that many bytes, several at once
//	wire up PORT REQUESTS BYTES AT_ONCE                     upload them
//	wire push PORT PUSH CONNECTIONS SECONDS PER_SECOND      post signed webhooks, each with a body and an id of its own;
//	                                                        PER_SECOND 0: each connection again once it was answered
//	wire receive PORT SECRET                                take deliveries until killed; the secret is a whsec_ one
//
// PUSH is a file with a JSON object (push.go). REQUESTS is a file with a JSON list of whole requests (for up: their heads), taken at random. Each load prints one line
// of JSON. Plain epoll instead of Go's own: with a native proxy between them, the two have one core for themselves.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strconv"
)

// The rule of the API: what is asked for ends in a name, and the credential must be this and the name.
const credentialBefore = "Bearer tok_"

// What no request may have anywhere: the beginning of a caller's own key.
const callerKeyBegins = "brk_"

const jsonBytes = 1024

func main() {
	if len(os.Args) < 3 {
		fail("usage: see main.go")
	}
	runtime.LockOSThread()
	var made any
	switch port := number(2); os.Args[1] {
	case "upstream":
		serve(port)
	case "closed":
		made = measure(port, of{requests(3), []byte(jsonBody())}, number(4), float64(number(5)), 0)
	case "push":
		made = measure(port, pushOf(3), number(4), float64(number(5)), float64(number(6)))
	case "receive":
		receive(port, os.Args[3])
	case "open":
		made = measure(port, of{requests(3), []byte(jsonBody())}, number(4), float64(number(5)), float64(number(6)))
	case "down":
		made = transfer(port, requests(3), number(4), number(5), download)
	case "up":
		made = transfer(port, requests(3), number(4), number(5), upload)
	default:
		fail("usage: see main.go")
	}
	must(json.NewEncoder(os.Stdout).Encode(made))
}

func number(at int) int {
	value, err := strconv.Atoi(os.Args[at])
	must(err)
	return value
}

func requests(at int) [][]byte {
	data, err := os.ReadFile(os.Args[at])
	must(err)
	var texts []string
	must(json.Unmarshal(data, &texts))
	made := make([][]byte, len(texts))
	for index, text := range texts {
		made[index] = []byte(text)
	}
	return made
}

func must(err error) {
	if err != nil {
		fail(err.Error())
	}
}

func fail(text string) {
	fmt.Fprintln(os.Stderr, "wire:", text)
	os.Exit(1)
}
