// Sends back what it gets; every message goes through a worker, a timer and a child process (cat).
//
// echo_go PORT ADDRESS...
package main

import (
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"time"
)

type job struct {
	data []byte
	done chan []byte
}

// One worker: its own child, one message at a time.
func work(jobs chan job) {
	child := exec.Command("cat")
	in, err := child.StdinPipe()
	if err != nil {
		log.Fatal(err)
	}
	out, err := child.StdoutPipe()
	if err != nil {
		log.Fatal(err)
	}
	if err := child.Start(); err != nil {
		log.Fatal(err)
	}
	for one := range jobs {
		if _, err := in.Write(one.data); err != nil {
			log.Fatal(err)
		}
		answer := make([]byte, len(one.data))
		if _, err := io.ReadFull(out, answer); err != nil {
			log.Fatal(err)
		}
		one.done <- answer
	}
}

func serve(peer net.Conn, jobs chan job) {
	defer peer.Close()
	buffer := make([]byte, 32768)
	for {
		n, err := peer.Read(buffer)
		if err != nil {
			return
		}
		done := make(chan []byte)
		<-time.After(time.Millisecond)
		jobs <- job{append([]byte(nil), buffer[:n]...), done}
		if _, err := peer.Write(<-done); err != nil {
			return
		}
	}
}

func main() {
	jobs := make(chan job)
	for i := 0; i < 2; i++ {
		go work(jobs)
	}
	for _, address := range os.Args[2:] {
		listener, err := net.Listen("tcp", net.JoinHostPort(address, os.Args[1]))
		if err != nil {
			log.Fatal(err)
		}
		go func() {
			for {
				peer, err := listener.Accept()
				if err != nil {
					log.Fatal(err)
				}
				go serve(peer, jobs)
			}
		}()
	}
	select {}
}
